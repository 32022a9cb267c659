"""How long a load waits for another node, by `io_deadline_s`.

    asked ──▶ lent ──▶ read by Mooncake ──▶ connected ──▶ read by TCP
    └ asking ─┘└────── mooncake ───────┘└── connect ──┘└── stall ───┘

A node may hang in any of these stages, after the ones before it took as long as they may. One that
sends slowly has the time for the bytes in addition: see `SLOWEST_BYTES_S`.
"""

from __future__ import annotations

from typing import NamedTuple

from flexkv.cluster.grants import IDLE_S
from flexkv.cluster.peer import PeerTimes
from flexkv.io.peer.sockets import STALL_NOTICED

ASKING_SHARE, ANSWER_SHARE, MOONCAKE_SHARE, STALL_SHARE = 0.35, 0.25, 0.15, 0.25
"""Of `io_deadline_s`."""
ANSWER_MAX_S, MOONCAKE_MAX_S = 10.0, 5.0
CONNECT_S, CONNECT_SHARE, CONNECT_MAX_S = 0.2, 0.1, 3.0
"""A connection takes several round trips, however short the deadline is."""


class ReaderTimes(NamedTuple):
    """How long the stages of a read may take.

    Attributes:
        asking_s: until a holder lends something; it may say several times that it is busy.
        answer_s: until the answer to one request. It is shorter, so that a request that is not
            answered is noticed.
        mooncake_s: for a read by Mooncake.
        connect_s: for a data connection.
        stall_s: for the next bytes to arrive over it.
    """

    asking_s: float
    answer_s: float
    mooncake_s: float
    connect_s: float
    stall_s: float

    @property
    def hang_s(self) -> float:
        """Return the longest time that a read takes to end, beside the time of its bytes."""
        return self.asking_s + self.mooncake_s + self.connect_s + STALL_NOTICED * self.stall_s

    @property
    def links(self) -> PeerTimes:
        """Return the times of links to peers. A link may take longer to come than a load waits."""
        return PeerTimes(data_s=self.connect_s, answer_s=self.answer_s)

    @property
    def places_s(self) -> float:
        """Return how long the places of a grant are used: its owner does not see when they are.

        The grant ends after `IDLE_S`. It may have been on its way for as long as an answer may
        take, and a read may begin at the last moment.
        """
        return IDLE_S - self.answer_s - self.mooncake_s


def reader_times(io_deadline_s: float) -> ReaderTimes:
    """Return the times with which a read that hangs is over at about `io_deadline_s`."""
    return ReaderTimes(
        ASKING_SHARE * io_deadline_s,
        min(ANSWER_MAX_S, ANSWER_SHARE * io_deadline_s),
        min(MOONCAKE_MAX_S, MOONCAKE_SHARE * io_deadline_s),
        min(CONNECT_MAX_S, CONNECT_S + CONNECT_SHARE * io_deadline_s),
        STALL_SHARE * io_deadline_s,
    )
