"""The calls of the task-id form: checks their arguments, and passes them to the tasks' loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flexkv.common.arguments import flag, integers, is_integer, seconds
from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ConfigError
from flexkv.common.request import KVResponse, Operation, TokenMask
from flexkv.engine.tickets import RequestSpec
from flexkv.front.loop_bridge import LoopBridge
from flexkv.index.keys import Namespace


class TaskForm:
    """The task-id form of a manager. `KVManager` says what the calls do and raise."""

    def __init__(self, bridge: LoopBridge) -> None:
        self._bridge, self._tasks = bridge, bridge.tasks

    def prepare(
        self, operation: Operation, token_ids: Any, token_mask: Any, namespace: Namespace
    ) -> tuple[int, TokenMask]:
        """Find what a get would load, or a put would have to store."""
        spec = RequestSpec(operation, token_ids, None, token_mask, namespace)
        return self._bridge.call(lambda: self._tasks.prepare(spec))

    def start(self, operation: Operation, *arguments: Any) -> int:
        """Start a request behind what this thread's streams have queued; return its task id."""
        return self._bridge.start_task(RequestSpec(operation, *arguments))

    def launch(self, task_ids: Any, slot_mappings: Any) -> None:
        """Start tasks that a match prepared."""
        self._bridge.check_process()
        ids = integers("task_ids", task_ids)
        slots = [slot_mappings] if is_integer(task_ids) else _each("slot_mappings", slot_mappings)
        for operation in (Operation.GET, Operation.PUT):
            self._bridge.order_requests_after(operation)
        self._bridge.call(lambda: self._tasks.launch(ids, slots))

    def cancel(self, task_ids: Any) -> None:
        """Cancel tasks, and wait for their end, unless this is the engine's own loop."""
        self._bridge.check_process()
        ids = integers("task_ids", task_ids)
        if (thread := self._bridge.thread) is not None:
            thread.call(lambda: self._tasks.cancel_and_drain(ids))
        else:
            self._bridge.call(lambda: self._tasks.cancel(ids))

    def wait(self, task_ids: Any, timeout: Any, completely: Any) -> dict[int, KVResponse]:
        """Return the tasks' responses; a task not over in time is cancelled."""
        thread = self._bridge.blocking("wait", "use await")
        ids = integers("task_ids", task_ids)
        wait_s = None if timeout is None else seconds("timeout", timeout)
        fully = flag("completely", completely)
        return thread.call(lambda: self._tasks.wait(ids, wait_s, fully))

    def try_wait(self, task_ids: Any) -> dict[int, KVResponse]:
        """Return the responses of those tasks that are over."""
        ids = integers("task_ids", task_ids)
        return self._bridge.call(lambda: self._tasks.try_wait(ids))


def _each(field: str, values: Any) -> list[Any]:
    """Return the elements of a list or array."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(field, kind_of(values), "must be a list, with one entry per task id")
    return list(values)
