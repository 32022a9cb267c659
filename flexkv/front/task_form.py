"""The task-id form: requests by numbers, for synchronous engines, and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexkv.common.arguments import flag, integers, is_integer, seconds
from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ClosedError, ConfigError
from flexkv.common.request import KVResponse, Operation, TokenMask
from flexkv.front.layerwise import LayerwiseGet, LayerwisePut
from flexkv.front.loop_bridge import LoopBridge
from flexkv.index.keys import Namespace


class TaskForm(LoopBridge):
    """What a synchronous engine calls."""

    def get_match(
        self, token_ids: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> tuple[int, TokenMask]:
        """Find what a get would load, and keep it until `launch` or `cancel`.

        Returns:
            A task id, and bool[tokens]: the tokens that `launch` needs slots for.
        """
        return self._call(lambda: self._tasks.get_match(token_ids, token_mask, namespace))

    def put_match(
        self, token_ids: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> tuple[int, TokenMask]:
        """Find what a put would have to store.

        Returns:
            A task id, and bool[tokens]: the tokens that `launch` needs slots for.
        """
        return self._call(lambda: self._tasks.put_match(token_ids, token_mask, namespace))

    def get_async(
        self,
        token_ids: Any,
        slot_mapping: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
    ) -> int:
        """Start a get, and give its task id."""
        return self.start_task(Operation.GET, token_ids, slot_mapping, token_mask, namespace)

    def put_async(
        self,
        token_ids: Any,
        slot_mapping: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
    ) -> int:
        """Start a put, and give its task id."""
        return self.start_task(Operation.PUT, token_ids, slot_mapping, token_mask, namespace)

    def prefetch_async(self, token_ids: Any, namespace: Namespace = None) -> int:
        """Start a prefetch, and give its task id."""
        return self.start_task(Operation.PREFETCH, token_ids, None, None, namespace)

    def get_layerwise(
        self,
        token_ids: Any,
        slot_mapping: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
    ) -> LayerwiseGet:
        """Start a get whose first layers may be used while the others are on their way.

        The arguments are as for `get`. Await what this gives for the response, or `wait` for its
        `task_id`.
        """
        arguments = token_ids, slot_mapping, token_mask, namespace
        return LayerwiseGet(self, Operation.GET, arguments)

    def put_layerwise(
        self,
        token_ids: Any,
        slot_mapping: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
    ) -> LayerwisePut:
        """Start a put that is told layer by layer what is written, as in a prefill.

        The arguments are as for `put`. Await what this gives for the response, or `wait` for its
        `task_id`. Until every layer was written it holds places in host memory: `cancel` it if
        they will not be.
        """
        arguments = token_ids, slot_mapping, token_mask, namespace
        return LayerwisePut(self, Operation.PUT, arguments)

    def launch(self, task_ids: int | Sequence[int], slot_mappings: Any | Sequence[Any]) -> None:
        """Start tasks that a match prepared; launching a launched one is a no-op.

        Raises:
            ConfigError: an id never issued, or slots that break a rule; none was launched.
        """
        self.check_process()
        ids = integers("task_ids", task_ids)
        slots = [slot_mappings] if is_integer(task_ids) else _each("slot_mappings", slot_mappings)
        for operation in (Operation.GET, Operation.PUT):
            self._order_after(operation)
        self._call(lambda: self._tasks.launch(ids, slots))

    def cancel(self, task_ids: int | Sequence[int]) -> None:
        """Cancel tasks; when this returns, no hardware touches their slots any more.

        On the engine's own loop, where nothing may block, it returns at once: there `try_wait`
        tells when a task is over.

        Raises:
            ConfigError: an id never issued.
        """
        self.check_process()
        ids = integers("task_ids", task_ids)
        if self._thread is not None:
            self._thread.call(lambda: self._tasks.cancel_and_drain(ids))
        else:
            self._call(lambda: self._tasks.cancel(ids))

    def wait(
        self, task_ids: int | Sequence[int], timeout: float | None = 20.0, completely: bool = False
    ) -> dict[int, KVResponse]:
        """Wait for tasks in this thread. One that is not over in time is cancelled: TIMEOUT.

        Args:
            task_ids: one or several.
            timeout: in seconds, for all of them; None = as long as it takes.
            completely: wait until the write-behind of puts is done too.

        Raises:
            ConfigError: an id that was never issued, or is collected already; or an argument of
                another kind.
            ClosedError: not started with `start()`: on the engine's own loop, await instead.
        """
        self.check_process()
        if self._thread is None:
            raise ClosedError("wait() blocks: it needs start(); on the engine's loop use await")
        ids = integers("task_ids", task_ids)
        wait_s = None if timeout is None else seconds("timeout", timeout)
        fully = flag("completely", completely)
        return self._thread.call(lambda: self._tasks.wait(ids, wait_s, fully))

    def try_wait(self, task_ids: int | Sequence[int]) -> dict[int, KVResponse]:
        """Give the responses of those tasks that are over; never blocks for the others."""
        ids = integers("task_ids", task_ids)
        return self._call(lambda: self._tasks.try_wait(ids))


def _each(field: str, values: Any) -> list[Any]:
    """Return the elements of a list or array."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(field, kind_of(values), "must be a list, with one entry per task id")
    return list(values)
