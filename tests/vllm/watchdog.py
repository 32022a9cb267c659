"""A watchdog over an engine: it notices one that stands still, and says whose fault that is.

vLLM can stand still by itself: a loaded prompt holds its blocks and waits for more, those behind it
hold theirs, and nothing runs that could be preempted. Its scheduler then spins for ever. FlexKV
avoids loads that lead there (`room.py`); other connectors do not.
"""

from __future__ import annotations

import os
import time
from typing import Any

LOADING = "WAITING_FOR_REMOTE_KVS"
STALL_S = float(os.environ.get("VLLM_STALL_S", "45"))


class EngineStuckError(AssertionError):
    """An engine stood still, through no fault of its connector's."""


class ConnectorStuckError(AssertionError):
    """An engine stood still because its connector did not answer, or did not end a load."""


class Watchdog:
    """Raises out of an engine's step once nothing has happened for `STALL_S` seconds."""

    def __init__(self, core: Any) -> None:
        """Watch the engine of this core, in this process."""
        self._scheduler = core.scheduler
        self._ended: set[str] = set()
        self._put_off: set[str] = set()
        self._since_s = time.monotonic()
        step = core.step_fn

        def watched() -> tuple[Any, bool]:
            outputs, executed = step()
            if executed or not self._scheduler.has_requests():
                self._since_s = time.monotonic()
            elif time.monotonic() - self._since_s > STALL_S:
                raise self.verdict()
            return outputs, executed

        core.step_fn = watched
        if self._scheduler.connector is not None:
            self._listen()

    def _listen(self) -> None:
        scheduler, connector = self._scheduler, self._scheduler.connector
        ended = scheduler._update_from_kv_xfer_finished
        matched = connector.get_num_new_matched_tokens

        def note_ended(output: Any) -> None:
            if output.finished_recving:
                self._ended |= set(output.finished_recving)
                self._since_s = time.monotonic()
            ended(output)

        def note_matched(request: Any, local: int) -> tuple[int | None, bool]:
            self._ended.discard(request.request_id)
            tokens, is_async = matched(request, local)
            note = self._put_off.add if tokens is None else self._put_off.discard
            note(request.request_id)
            return tokens, is_async

        scheduler._update_from_kv_xfer_finished = note_ended
        connector.get_num_new_matched_tokens = note_matched

    def verdict(self) -> AssertionError:
        """Return the error that says why nothing happens."""
        scheduler = self._scheduler
        held = [*scheduler.kv_holding_waiting, *scheduler.waiting]
        told = {r.request_id: (r.status.name, r.num_computed_tokens, r.num_tokens) for r in held}
        loading = {name for name, (status, *_) in told.items() if status == LOADING} - self._ended
        put_off = self._put_off & told.keys()
        facts = {
            "running": [request.request_id for request in scheduler.running],
            "waiting": told,
            "loads not ended": sorted(loading),
            "put off": sorted(put_off),
            "free blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        }
        if loading or told.keys() <= put_off:
            return ConnectorStuckError(f"the connector keeps vLLM waiting: {facts}")
        return EngineStuckError(f"vLLM stands still by itself: {facts}")
