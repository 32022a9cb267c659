"""Finds agents that do not answer their copies, and stops using the devices of their instances.

    a copy is unanswered for the deadline ──▶ stuck: the instance's requests are refused, what was
                 │                            not sent fails, nobody waits for the rest
                 └── answered, or its connection has ended ──▶ served again

An agent that does not answer may be a stopped process, which can continue at any time and then read
and write host memory. So the blocks of the copies that were sent to it stay claimed until it
answers or its connection ends; that happens only when the process has ended or has finished its
copies. The connection is never cut for this, because that would not stop the copies.
"""

from __future__ import annotations

from collections.abc import Callable

from flexkv.actors.deadline_timer import DeadlineTimer
from flexkv.engine.runner import RequestRunner
from flexkv.observe.logs import get_logger
from flexkv.server.fleet import FleetPort, Instance

log = get_logger(__name__)


class DeviceDeadlines:
    """The search for stuck instances of a fleet; it runs only while copies are under way."""

    def __init__(
        self,
        fleet: FleetPort,
        runner: RequestRunner,
        deadline_s: float,
        on_stuck: Callable[[int, str], None],
    ) -> None:
        """Check the copies of `fleet`, each of which may take `deadline_s`.

        `runner` runs the fleet's requests. `on_stuck` is called with the number of each instance
        that is found stuck, and the reason.
        """
        self._on_stuck = on_stuck
        self._fleet, self._runner, self._deadline_s = fleet, runner, deadline_s
        self._stuck: set[int] = set()
        self._timer = DeadlineTimer(deadline_s, self.look)
        fleet.begun = self._timer.arm

    def look(self) -> None:
        """Update which instances are stuck, and act on each change."""
        late = {number: ranks for number, each in self._instances() if (ranks := self._late(each))}
        for number in late.keys() - self._stuck:
            self._begin(number, late[number])
        for number in self._stuck - late.keys():
            self._end(number)
        if self._stuck or any(
            port.is_busy for _, each in self._instances() for port in each.ports.values()
        ):
            self._timer.arm()

    def close(self) -> None:
        """Stop checking."""
        self._timer.close()

    # -- inside ---------------------------------------------------------------------------------

    def _instances(self) -> list[tuple[int, Instance]]:
        return list(self._fleet.instances.items())

    def _late(self, instance: Instance) -> list[int]:
        """Return the ranks whose oldest copy is past the deadline."""
        ports = instance.ports.items()
        return sorted(rank for rank, port in ports if port.oldest_s() > self._deadline_s)

    def _begin(self, number: int, ranks: list[int]) -> None:
        instance = self._fleet.instances[number]
        why = f"the devices of instance {number} do not answer (ranks {ranks})"
        log.error("instance_stuck", instance=number, ranks=ranks, deadline_s=self._deadline_s)
        self._stuck.add(number)
        instance.stuck = why
        for port in instance.ports.values():
            port.fail_unsent(why)
        self._on_stuck(number, why)
        self._runner.turn_away(number, why)

    def _end(self, number: int) -> None:
        self._stuck.discard(number)
        if (instance := self._fleet.instances.get(number)) is not None:
            instance.stuck = ""
        log.info("instance_recovered", instance=number)
        self._runner.take_back(number)
