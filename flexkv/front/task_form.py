"""The task-id form of requests, for synchronous engines, and requests that go by layers."""

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
    """The methods that a synchronous engine calls."""

    def get_match(
        self, token_ids: Any, token_mask: Any = None, namespace: Namespace = None
    ) -> tuple[int, TokenMask]:
        """Find what a get would load, and keep it from eviction until `launch` or `cancel`.

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
        """Start a get, and return its task id."""
        return self.start_task(Operation.GET, token_ids, slot_mapping, token_mask, namespace)

    def put_async(
        self,
        token_ids: Any,
        slot_mapping: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
    ) -> int:
        """Start a put, and return its task id."""
        return self.start_task(Operation.PUT, token_ids, slot_mapping, token_mask, namespace)

    def prefetch_async(self, token_ids: Any, namespace: Namespace = None) -> int:
        """Start a prefetch, and return its task id."""
        return self.start_task(Operation.PREFETCH, token_ids, None, None, namespace)

    def get_layerwise(
        self,
        token_ids: Any,
        slot_mapping: Any,
        token_mask: Any = None,
        namespace: Namespace = None,
    ) -> LayerwiseGet:
        """Start a get whose first layers may be used while the others are on their way.

        The arguments are as for `get`. Await the returned object for the response, or `wait` for
        its `task_id`.
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
        """Start a put that stores each layer once the caller has written it, as in a prefill.

        The arguments are as for `put`. Await the returned object for the response, or `wait` for
        its `task_id`. It holds places in host memory until every layer is written: `cancel` it if
        that will not happen.
        """
        arguments = token_ids, slot_mapping, token_mask, namespace
        return LayerwisePut(self, Operation.PUT, arguments)

    def launch(self, task_ids: int | Sequence[int], slot_mappings: Any | Sequence[Any]) -> None:
        """Start tasks that a match prepared; launching a launched one is a no-op.

        Raises:
            ConfigError: an id was never issued, or slots break a rule; no task was launched.
        """
        self.check_process()
        ids = integers("task_ids", task_ids)
        slots = [slot_mappings] if is_integer(task_ids) else _each("slot_mappings", slot_mappings)
        for operation in (Operation.GET, Operation.PUT):
            self._order_after(operation)
        self._call(lambda: self._tasks.launch(ids, slots))

    def cancel(self, task_ids: int | Sequence[int]) -> None:
        """Cancel tasks; when this returns, no hardware touches their slots any more.

        On the engine's own loop, where nothing may block, it returns at once; use `try_wait` there
        to find out when a task is over.

        Raises:
            ConfigError: an id was never issued.
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
        """Return the tasks' responses; a task not over in time is cancelled, with status TIMEOUT.

        The calling thread waits.

        Args:
            task_ids: one or several.
            timeout: in seconds, for all of them; None = as long as it takes.
            completely: wait until the write-behind of puts is done too.

        Raises:
            ConfigError: an id was never issued, or is collected already, or an argument has the
                wrong type.
            ClosedError: not started with `start()`: on the engine's own loop, await instead.
        """
        self.check_process()
        if self._thread is None:
            why = "wait() is for a manager started with start(); with `async with`, use await"
            raise ClosedError(why)
        ids = integers("task_ids", task_ids)
        wait_s = None if timeout is None else seconds("timeout", timeout)
        fully = flag("completely", completely)
        return self._thread.call(lambda: self._tasks.wait(ids, wait_s, fully))

    def try_wait(self, task_ids: int | Sequence[int]) -> dict[int, KVResponse]:
        """Return the responses of those tasks that are over; never wait for the others."""
        ids = integers("task_ids", task_ids)
        return self._call(lambda: self._tasks.try_wait(ids))


def _each(field: str, values: Any) -> list[Any]:
    """Return the elements of a list or array."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(field, kind_of(values), "must be a list, with one entry per task id")
    return list(values)
