"""Barriers that wait for ops of other requests, which fill the blocks that they need."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from flexkv.actors.flight import Flight
from flexkv.common.errors import UnfilledError
from flexkv.graph.run import OpDone, OpFailed, RunEvent

FlightEvent: TypeAlias = tuple[Flight, RunEvent]


class _Joiner(NamedTuple):
    flight: Flight
    op: int


class Joins:
    """Which barriers wait for which ops."""

    __slots__ = ("_joiners",)

    def __init__(self) -> None:
        """Begin with none."""
        self._joiners: dict[int, list[_Joiner]] = {}

    def __contains__(self, op_id: int) -> bool:
        """Return whether a barrier waits for an op."""
        return op_id in self._joiners

    def join(self, op_id: int, flight: Flight, barrier: int) -> None:
        """Make a flight's barrier wait for an op."""
        self._joiners.setdefault(op_id, []).append(_Joiner(flight, barrier))

    def leave(self, op_id: int, flight: Flight, barrier: int) -> FlightEvent:
        """Make a barrier wait no more; return the event that ends it."""
        joiners = self._joiners[op_id]
        joiners.remove(_Joiner(flight, barrier))
        if not joiners:
            del self._joiners[op_id]
        return flight, _barrier_event(barrier, False)

    def end(self, op_id: int, filled: bool) -> list[FlightEvent]:
        """Return the events of the barriers that have waited for an op: it has filled its blocks,
        or will not."""
        joiners = self._joiners.pop(op_id, ())
        return [(flight, _barrier_event(barrier, filled)) for flight, barrier in joiners]


def _barrier_event(op: int, filled: bool) -> RunEvent:
    """Return the event that tells a barrier how the op for which it waits has ended."""
    if filled:
        return OpDone(op)
    why = "the blocks that it waited for were not filled"
    return OpFailed(op, UnfilledError(op, "wait", 0, why))
