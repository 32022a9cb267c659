"""How to copy: by copy engine, by kernel, or staged, as measured on the device.

A port has one layout, so the size of its chunks is fixed. What remains is a small table for each
direction: the best way by the number of chunks. It is measured once for each device, driver and
layout, which takes a little over a tenth of a second, and kept on disk.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

import msgspec

from flexkv.common.decoding import decoded
from flexkv.common.errors import MalformedError


class CopyMethod(StrEnum):
    """A method to copy scattered chunks; those that cost the device less come first."""

    ENGINE = "engine"
    """The copy engine, with a descriptor for each chunk; needs no thread blocks."""
    STAGED = "staged"
    """The kernel gathers blocks in device memory, the copy engine moves them; or the reverse."""
    KERNEL = "kernel"
    """The kernel reads or writes pinned host memory itself."""


class Choice(NamedTuple):
    """A way to copy: the method, and the number of thread blocks of the kernel."""

    method: CopyMethod = CopyMethod.ENGINE
    thread_blocks: int = 8

    @property
    def cost(self) -> int:
        """Return the cost to the device: above all, thread blocks that wait for the link."""
        return {CopyMethod.ENGINE: 0, CopyMethod.STAGED: 1, CopyMethod.KERNEL: self.thread_blocks}[
            self.method
        ]


WAYS = (
    Choice(CopyMethod.ENGINE),
    Choice(CopyMethod.STAGED, 16),
    *(Choice(CopyMethod.KERNEL, count) for count in (2, 4, 8, 16, 32)),
)
AS_GOOD = 0.95
"""A way that costs the device less is chosen if it reaches this fraction of the best rate."""
STAGED_AS_GOOD = 0.8
"""The same for staged copies, which disturb the device less: on an H200 a matrix product kept its
full speed beside staged copies in both directions, and 0.4 to 0.9 of it beside the kernel's."""
TRIALS = 3
COUNTS = (16, 512, 16384)
"""Numbers of chunks at which the ways are measured."""
HOPELESS = 0.5
"""A way below this fraction of the best rate is not measured with more chunks."""


class Choices(NamedTuple):
    """The choices for one direction: `choices[i]` up to `counts[i]` chunks, the last one beyond."""

    choices: tuple[Choice, ...]
    counts: tuple[int, ...] = ()

    @classmethod
    def always(cls, method: CopyMethod, thread_blocks: int = Choice().thread_blocks) -> Choices:
        """Return the same choice for any number of chunks."""
        return cls((Choice(method, thread_blocks),))

    def without(self, method: CopyMethod) -> Choices:
        """Return these choices, with the copy engine in place of one method."""
        engine = Choice(CopyMethod.ENGINE)
        return self._replace(
            choices=tuple(engine if each.method is method else each for each in self.choices)
        )

    def of(self, chunks: int) -> Choice:
        """Return the choice for this number of chunks."""
        return self.choices[bisect_right(self.counts, chunks - 1)]

    def unstaged(self, chunks: int) -> Choice:
        """Return the nearest choice for this number of chunks, or fewer, that is not staged."""
        found = self.choices[: bisect_right(self.counts, chunks - 1) + 1]
        direct = (each for each in reversed(found) if each.method is not CopyMethod.STAGED)
        return next(direct, Choice(CopyMethod.KERNEL, 4))


class CopyPreference(NamedTuple):
    """What the configuration sets for one direction; None leaves a field to the measurement."""

    use_engine: bool | None = None
    thread_blocks: int | None = None

    @property
    def settled(self) -> Choices | None:
        """Return the choices if the configuration leaves nothing to measure, else None."""
        if self.use_engine:
            return Choices.always(CopyMethod.ENGINE)
        if self.use_engine is False and self.thread_blocks:
            return Choices.always(CopyMethod.KERNEL, self.thread_blocks)
        return None

    def made_of(self, measured: Choices) -> Choices:
        """Return the measured choices, with the configured fields replaced."""
        return measured._replace(choices=tuple(self._made_of(each) for each in measured.choices))

    def _made_of(self, choice: Choice) -> Choice:
        if self.use_engine is not None:
            choice = choice._replace(
                method=CopyMethod.ENGINE if self.use_engine else CopyMethod.KERNEL
            )
        return choice._replace(thread_blocks=self.thread_blocks or choice.thread_blocks)


def decide(rates: Mapping[Choice, float]) -> Choice:
    """Return the way that costs the device least, among those about as fast as the best.

    Args:
        rates: the speed of each way, all in one unit.
    """
    best = max(rates.values())
    enough = {way: STAGED_AS_GOOD if way.method is CopyMethod.STAGED else AS_GOOD for way in rates}
    return min((way for way in rates if rates[way] >= enough[way] * best), key=_cost)


def _cost(choice: Choice) -> int:
    return choice.cost


def measure(timed: Callable[[Choice, int], float], most: int) -> Choices:
    """Return the choices for one direction.

    Args:
        timed: copies a number of chunks in a given way, and returns the seconds that it took.
        most: the largest number of chunks to measure.
    """
    counts = [count for count in COUNTS if count < most] + [most]
    choices, ways = [], list(WAYS)
    for count in counts:
        rates = {}
        for way in ways:
            timed(way, count)  # warm up
            rates[way] = 1 / min(timed(way, count) for _ in range(TRIALS))
        choices.append(decide(rates))
        if count >= COUNTS[1]:
            ways = [way for way in ways if rates[way] >= HOPELESS * max(rates.values())]
    between = [int((few * many) ** 0.5) for few, many in pairwise(counts)]
    return Choices(tuple(choices), tuple(between))


def encode(choices: list[Choices]) -> bytes:
    """Return the choices of all directions as JSON."""
    return msgspec.json.encode(choices)


def decode(text: bytes) -> list[Choices] | None:
    """Return the choices that `encode` wrote; None for anything else."""
    try:
        found = decoded(msgspec.json.Decoder(list[Choices]), text)
    except MalformedError:
        return None
    sound = all(
        len(each.choices) == len(each.counts) + 1
        and all(choice.thread_blocks > 0 for choice in each.choices)
        for each in found
    )
    return found if sound else None
