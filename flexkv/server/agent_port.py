"""The server's end of one rank's device: it sends copies to the agent, a bounded number at once.

    submit ──▶ queue (to the device first) ──window──▶ sent ──Copied──▶ ended
                   │                                    │
                   └── fail_unsent ──▶ failed           └── gone: the connection has ended

A copy that was sent stays under way until the agent answers or its connection ends: a stopped
process may wake up and write into host memory at any later time. Copies that wait for the window
were never sent, so they can fail at once if the agent does not answer. An agent that does not read
cannot make the server buffer more messages for it than the window.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flexkv.common.errors import AgentGoneError, TransferError
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import Tier, Transfer
from flexkv.io.ports import Completion
from flexkv.links.link import Link
from flexkv.server.wire import Copied, Copy, Message, ProtocolError, ToServer

UNREAD_BYTES_MAX = 16 << 20
"""An agent with more unread bytes than this is dismissed, as is its whole instance."""
COPIES_MIN = 4
"""How many copies may always be sent, however large: one being made, the others waiting."""


class RemoteDevice:
    """The calls of a port that need no action when the device is in another process."""

    failure: TransferError | None = None

    def order_after(self, to_device: bool) -> None:
        """Do nothing: agents order their copies themselves."""

    def suspend(self) -> None:
        """Do nothing: an agent that sleeps disconnects."""

    def resume(self, layouts: Sequence[PagedLayout], owner: object) -> None:
        """Do nothing: an agent that wakes connects anew."""


class _Sent(NamedTuple):
    transfer: Transfer
    since_s: float


class AgentPort(RemoteDevice):
    """The port to the device of one rank, through its agent."""

    def __init__(
        self,
        link: Link[ToServer],
        part_bytes: Sequence[int],
        num_blocks: int,
        window_bytes: int | None = None,
    ) -> None:
        """Create the port of a device of `num_blocks` blocks.

        `part_bytes` has, for each group, the bytes of the device's part of a block. At most
        `window_bytes` may be sent and unanswered in each direction; None sets no limit.
        """
        self._part_bytes, self.num_blocks = part_bytes, num_blocks
        self._link, self._window_bytes = link, window_bytes
        self.is_dismissed = False
        self._queues: dict[bool, deque[Transfer]] = {True: deque(), False: deque()}
        self._sent: dict[int, _Sent] = {}
        self._unanswered = {True: [0, 0], False: [0, 0]}
        """How many copies are unanswered, and their bytes, by direction: True is to the device."""
        self._ended: list[Completion] = []
        self._wake: Callable[[], None] | None = None

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop."""
        self._wake = wake

    def submit(self, transfer: Transfer) -> None:
        """Queue a transfer for the agent; if the agent is not connected, it fails at once."""
        if not self._link.is_open:
            self._end(transfer, "the agent is not connected")
            return
        self._queues[transfer.route.target is Tier.DEVICE].append(transfer)
        self._pump()

    def tell(self, message: Message) -> bool:
        """Send a message; return whether the agent has read most of those before."""
        self._link.send(message)
        return self._link.unsent_bytes <= UNREAD_BYTES_MAX

    def copied(self, message: Copied) -> None:
        """Record that the agent has ended a copy.

        Raises:
            ProtocolError: no such copy is under way.
        """
        if message.op_id not in self._sent:
            raise ProtocolError(f"copy {message.op_id} is not under way")
        self._answered(message.op_id, message.error)
        self._pump()

    def oldest_s(self) -> float:
        """Return for how long the oldest copy has been unanswered; 0 if there is none."""
        for _, since_s in self._sent.values():
            return time.monotonic() - since_s
        return 0.0

    @property
    def is_busy(self) -> bool:
        """Return whether a copy is unanswered."""
        return bool(self._sent)

    def fail_unsent(self, why: str) -> None:
        """Fail the copies that were not sent yet: the agent does not know of them."""
        for queue in self._queues.values():
            while queue:
                self._end(queue.popleft(), why)

    def dismiss(self) -> None:
        """Have the agent finish its copies and disconnect; it may connect again."""
        self.is_dismissed = True
        self._link.end()
        self.fail_unsent("the agent was dismissed")

    def gone(self) -> None:
        """Fail all copies: the agent's process has ended, or copies nothing any more."""
        self.fail_unsent("the agent is gone")
        for op_id in list(self._sent):
            self._answered(op_id, "the agent is gone")

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Do nothing: the session owns the link."""

    # -- inside ---------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send what the windows have room for, copies to the device first.

        While copies to the device wait, copies to the host are sent one at a time, so that puts do
        not starve.
        """
        inbound, outbound = self._queues[True], self._queues[False]
        while inbound and self._has_room(True, inbound[0]):
            self._send(True, inbound.popleft())
        while outbound and self._has_room(False, outbound[0]):
            if inbound and self._unanswered[False][0]:
                return
            self._send(False, outbound.popleft())

    def _has_room(self, to_device: bool, transfer: Transfer) -> bool:
        copies, copies_bytes = self._unanswered[to_device]
        if self._window_bytes is None or copies < COPIES_MIN:
            return True
        return copies_bytes + self._bytes_of(transfer) <= self._window_bytes

    def _bytes_of(self, transfer: Transfer) -> int:
        layers, watch = transfer.layers, transfer.watch
        block_bytes = self._part_bytes[transfer.group]
        if layers is not None and watch is not None:
            block_bytes = block_bytes * (layers.last - layers.first) // watch.num_layers
        return transfer.block_count * block_bytes

    def _send(self, to_device: bool, transfer: Transfer) -> None:
        self._count(transfer, 1)
        self._sent[transfer.op_id] = _Sent(transfer, time.monotonic())
        host_ids, device_ids = transfer.sides
        layers = transfer.layers
        piece = None if layers is None else (layers.whole, layers.first, layers.last)
        ids = host_ids.tobytes(), device_ids.tobytes()
        self._link.send(Copy(transfer.op_id, to_device, *ids, transfer.group, piece))

    def _count(self, transfer: Transfer, sign: int) -> None:
        unanswered = self._unanswered[transfer.route.target is Tier.DEVICE]
        unanswered[0] += sign
        unanswered[1] += sign * self._bytes_of(transfer)

    def _answered(self, op_id: int, error: str) -> None:
        transfer = self._sent.pop(op_id).transfer
        self._count(transfer, -1)
        self._end(transfer, error)

    def _end(self, transfer: Transfer, error: str) -> None:
        failure = None
        if error:
            route = str(transfer.route)
            failure = AgentGoneError(transfer.op_id, route, transfer.block_count, error)
        self._ended.append(Completion(transfer.op_id, failure))
        if self._wake is not None:
            self._wake()
