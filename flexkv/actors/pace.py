"""Bounds the bytes in flight at a disk: enough to keep it busy, and no more.

A new read waits for everything in flight, so bytes in flight are a delay. A disk needs
`rate x latency` bytes in flight to reach its rate; more than that only wait. Both are measured, as
BBR does for a network path (Cardwell et al., ACM Queue 14(5), 2016):

    STEADY ──after PERIOD_S──▶ RAISING ──no faster any more──▶ DRAINING ──one alone──▶ STEADY
                            window doubles              one piece at a time

The rate is the highest of the last intervals in which more was queued than the window allowed. The
latency of a piece is the time that it took, less the time for its bytes at that rate; the shortest
latency counts.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum

PIECE_S = 0.5e-3
"""The longest that a piece may take at the measured rate, unless it is a single block."""
DELAY_S = 2e-3
"""Bytes in flight may delay a read of one block by the time the read takes alone, plus this."""
MARGIN = 1.25
"""The window covers this many times the shortest latency, because most pieces take longer."""
INTERVAL_PIECES, RAISED_PIECES = 8, 4
"""The fewest pieces in one measurement of the rate, and the fewest while the window is being
raised: fewer then, because a raised window delays reads."""
RATES = 4
"""The rate is the highest of this many latest measurements."""
HELPS, ENOUGH = 1.15, 0.8
"""Where latencies vary, a window for the shortest one is too small. So while the rate is below
ENOUGH times the best rate that the search found, the window is enlarged, as long as each
enlargement raises the rate by the factor HELPS."""
MORE_BYTES_MAX = 8 << 20
"""The window is not enlarged beyond this for that reason, so that noise delays no read without
bound."""
FASTER = 1.1
"""The window is raised further only if the last raise made the disk faster by this factor."""
PERIOD_S, PERIOD_PIECES = 30.0, 2000
"""The least time and pieces between two searches; a latency counts for at most two periods."""
FIRST_PIECES = 2
"""Pieces allowed in flight before anything has been measured."""


class _State(Enum):
    STEADY = "steady"
    RAISING = "raising"
    DRAINING = "draining"


class Pace:
    """The window of one direction of a disk.

    Attributes:
        bytes_max: the most bytes that may be in flight; one piece is always allowed.
        piece_bytes_max: the largest submission, except that one block is always allowed.
    """

    def __init__(self, bytes_most: int, piece_bytes_most: int, block_bytes: int) -> None:
        """Start with a window of a few pieces.

        Args:
            bytes_most: bound on `bytes_max`.
            piece_bytes_most: bound on `piece_bytes_max`.
            block_bytes: the smallest piece.
        """
        self._bytes_most, self._piece_bytes_most = bytes_most, piece_bytes_most
        self._block_bytes = block_bytes
        self.piece_bytes_max = piece_bytes_most
        self.bytes_max = min(bytes_most, FIRST_PIECES * self._piece_bytes)
        self._state = _State.RAISING
        self._since_s, self._pieces = -math.inf, 0
        self._raised_from_rate, self._raised_s, self._is_doubted = 0.0, -math.inf, False
        self._rates: deque[float] = deque(maxlen=RATES)
        self._quickest = self._quickest_before = (math.inf, 0)
        """The pieces with the shortest latency, of this period and the last: seconds and bytes."""
        self._best_rate = self._doubted_rate = 0.0
        self._more_bytes = self._tried_bytes = 0
        self._intervals = 0
        self._tried_from = 0.0
        """The rate before the window was enlarged on trial; 0 while there is no trial."""
        self._interval_begin_s: float | None = None
        self._interval_bytes = self._interval_pieces = 0

    @property
    def rate(self) -> float:
        """Return the disk's measured rate in bytes per second; 0 if it is unknown."""
        return max(self._rates, default=0.0)

    @property
    def _able_rate(self) -> float:
        """Return the rate that the disk is assumed to be capable of, in bytes per second."""
        return max(self.rate, self._best_rate)

    @property
    def _piece_bytes(self) -> int:
        return max(self.piece_bytes_max, self._block_bytes)

    def moved(self, nbytes: int) -> None:
        """Count bytes that the disk has moved, in either direction."""
        self._interval_bytes += nbytes

    def ended(self, nbytes: int, begin_s: float, now_s: float) -> None:
        """Record the end of a piece: its size, and when it was submitted and reaped."""
        self._interval_pieces += 1
        self._pieces += 1
        if begin_s < self._raised_s:  # it was submitted before the raise
            self._interval_begin_s = None
        piece = now_s - begin_s, nbytes
        if self._latency_s(piece) < self._latency_s(self._quickest):
            self._quickest = piece
        if self._state is _State.DRAINING and begin_s > self._since_s:  # it was submitted alone
            self._be(_State.STEADY, now_s)

    def turned(self, now_s: float, is_full: bool) -> None:
        """Measure the rate at the end of an actor's turn, and adapt the window.

        Args:
            now_s: the time.
            is_full: whether more was queued than the window allows; otherwise the rate says
                nothing about the disk.
        """
        if not is_full:
            self._interval_begin_s = None
            return
        if self._interval_begin_s is None:
            self._begin_interval(now_s)
            return
        wanted = RAISED_PIECES if self._state is _State.RAISING else INTERVAL_PIECES
        wanted = max(wanted, 2 * self.bytes_max // self._piece_bytes)
        if self._interval_pieces < wanted or now_s <= self._interval_begin_s:
            return
        rate = self._interval_bytes / (now_s - self._interval_begin_s)
        self._begin_interval(now_s)
        if self._state is not _State.DRAINING:
            self._measured(rate, now_s)

    def _begin_interval(self, now_s: float) -> None:
        self._interval_begin_s = now_s
        self._interval_bytes = self._interval_pieces = 0

    def _measured(self, rate: float, now_s: float) -> None:
        self._rates.append(rate)
        if self._state is _State.RAISING:
            if rate >= FASTER * self._raised_from_rate and self.bytes_max < self._bytes_most:
                self._raise(rate, now_s)
            elif self._is_doubted:
                self._best_rate = min(rate, self._doubted_rate)
                self._be(_State.DRAINING, now_s)
            else:  # one measurement may be wrong
                self._is_doubted, self._doubted_rate = True, rate
        elif now_s - self._since_s >= PERIOD_S and self._pieces >= PERIOD_PIECES:
            self._quickest_before, self._quickest = self._quickest, (math.inf, 0)
            self._state = _State.RAISING
            self._best_rate, self._more_bytes = rate, self._more_bytes // 2
            self._raise(rate, now_s)
        else:
            self._intervals += 1
            if self._intervals % RATES == 0:
                self._adapt()
            self._follow()

    def _adapt(self) -> None:
        """Enlarge the window while the disk is slower than it was, as long as that helps."""
        rate = self.rate
        if self._tried_from and rate < HELPS * self._tried_from:
            self._more_bytes -= self._tried_bytes
            self._best_rate = rate  # the disk itself is slower than it was
        elif rate < ENOUGH * self._best_rate:
            self._tried_bytes = min(max(self._piece_bytes, self.bytes_max), MORE_BYTES_MAX)
            self._more_bytes += self._tried_bytes
            self._tried_from = rate
            return
        else:
            self._more_bytes -= self._more_bytes // 8  # it may not be needed any more
        self._tried_from = 0.0

    def _raise(self, rate: float, now_s: float) -> None:
        """Double the window, to find out whether the disk gets faster."""
        self._raised_from_rate, self._raised_s, self._is_doubted = rate, now_s, False
        self.bytes_max = min(self._bytes_most, 2 * self.bytes_max)

    def _be(self, state: _State, now_s: float) -> None:
        self._state, self._since_s, self._pieces = state, now_s, 0
        self._interval_begin_s, self._intervals, self._tried_from = None, 0, 0.0
        self._follow()

    def _latency_s(self, piece: tuple[float, int]) -> float:
        """Return by how many seconds a piece took longer than its bytes take at the disk's rate."""
        seconds, nbytes = piece
        rate = self._able_rate
        return max(0.0, seconds - nbytes / rate) if rate else seconds

    def _follow(self) -> None:
        """Set the window from the measured rate and latency."""
        if self._state is _State.DRAINING:
            self.bytes_max = 0
            return
        rate = self._able_rate
        self.piece_bytes_max = min(self._piece_bytes_most, int(rate * PIECE_S))
        piece_bytes = self._piece_bytes
        latency_s = min(map(self._latency_s, (self._quickest, self._quickest_before)))
        needed = rate * (MARGIN * latency_s + PIECE_S) + piece_bytes
        # A new read waits for one piece to end, and then for everything in flight.
        allowed = rate * (2 * latency_s + DELAY_S) + 2 * self._block_bytes - piece_bytes
        whole = math.ceil(needed / piece_bytes) * piece_bytes
        least = whole if whole <= allowed else whole - piece_bytes
        more_max = max(0, MORE_BYTES_MAX - least)
        self.bytes_max = min(self._bytes_most, least + min(self._more_bytes, more_max))
