"""Which generation a cluster's blocks are of, as a node and the store agree on it.

A generation is a number whose lower bits are random: later ones are larger, and none ever repeats,
even if the store has lost everything and counting begins anew. The store has

    now     the generation; 0 before the first reset, and after it has lost everything
    made    whether a reset has made it in this life of the store; else a node has put it back
    book    random: of this life of the store, so another one after it has lost everything
    closed  the name of a generation in which a node was cleared alone: nobody new joins that

A generation's *name* is its number, or the book before the first reset. What outlives a run of an
engine is kept only if the name noted beside it is the present one. A node that runs compares:

    now is ours               agreed
    now is 0                  the store has lost it: put ours back
    ours is 0                 clear, and follow
    the same book: later      clear, and follow: it was reset
                   earlier    the store was set back to an older state: begin a new generation
    another book:  made       clear, and follow: it was reset after the store had lost ours
                   put back   two nodes remember different ones: begin a new generation

Where nobody can know whose blocks are older, all are forgotten.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

RANDOM_BITS: Final = 24
GENERATION_MAX: Final = (1 << 43) - 1
"""With 20 bits for clears of single engines behind it, a pool's number fits into 63 bits."""


class Heard(NamedTuple):
    """What the store says: see above. What it does not have is 0."""

    now: int = 0
    made: int = 0
    book: int = 0
    closed: int = 0

    @property
    def name(self) -> int:
        """Return the name of the generation; 0 if there is none yet."""
        return self.now or self.book


class Noted(NamedTuple):
    """The generation of blocks that an earlier run has left.

    Attributes:
        name: of the generation; 0 if it is not known.
        is_apart: whether the node was cleared alone in it.
    """

    name: int = 0
    is_apart: bool = False


class Joined(NamedTuple):
    """What a node learns when it first hears of the generation.

    Attributes:
        is_noted: whether it is the one of the blocks of an earlier run.
        is_closed: whether a node was cleared alone in it.
    """

    is_noted: bool
    is_closed: bool


class GenerationStore(Protocol):
    """The part of the cluster's store that has the generation. Each call may fail."""

    async def put_back(self, generation: int) -> None:
        """Put back a book, and a generation unless it is 0, if the store has lost them."""
        ...

    async def close_generation(self, name: int) -> None:
        """Record that a node was cleared alone in this generation, so that nobody new joins it."""
        ...

    async def begin(self, generation: int) -> None:
        """Begin a generation, unless a later one has begun."""
        ...

    async def advance(self, known: int) -> int:
        """Begin a generation later than `known` and than the cluster's; return it."""
        ...


@dataclass
class Generations:
    """The generation as one node follows it.

    Attributes:
        noted: of an earlier run.
        number: of the generation; 0 before the first reset.
        book: of the store when both agreed last; 0 before anything was heard.
        lost: what to put back, since the store has lost it; None if it has not.
        doubted: what a new generation has to be later than; None if none is needed.
        has_no_book: whether the store needs one.
        on_joined: is told when the generation is heard for the first time.
        on_renamed: is called when the name of the generation is another one, and its blocks stay.
        on_reset: is told of a new generation: nothing of an older one may stay.
    """

    noted: Noted = field(default_factory=Noted)
    number: int = 0
    book: int = 0
    lost: int | None = None
    doubted: int | None = None
    has_no_book: bool = False
    on_joined: Callable[[Joined], None] = lambda _: None
    on_renamed: Callable[[], None] = lambda: None
    on_reset: Callable[[int], None] = lambda _: None

    @property
    def is_known(self) -> bool:
        """Return whether the store has told the generation in this run."""
        return self.book != 0

    @property
    def is_settled(self) -> bool:
        """Return whether the store has what it should have."""
        return self.lost is None and self.doubted is None and not self.has_no_book

    @property
    def name(self) -> int:
        """Return the name of this node's generation; 0 if it is not known."""
        return self.number or self.book

    def take(self, heard: Heard) -> None:
        """Take what the store says now."""
        now, is_same_book = heard.now, heard.book == self.book
        self.lost = self.doubted = None
        self.has_no_book = not heard.book
        if not heard.book:
            self.lost = self.number or None  # what else it says is of before it lost its book
        elif not self.is_known:
            self._join(heard)
        elif now == self.number:
            self._agree(heard)
        elif not now:
            self.lost = self.number
        elif not self.number or (now > self.number if is_same_book else heard.made):
            self._follow(heard)
        else:
            self.doubted = max(now, self.number)

    def _join(self, heard: Heard) -> None:
        is_noted = self.noted.name == heard.name
        self.book = heard.book
        self.number = heard.now
        self.on_joined(Joined(is_noted, heard.closed == heard.name))

    def _agree(self, heard: Heard) -> None:
        before, self.book = self.name, heard.book
        if self.name != before:
            self.on_renamed()

    def _follow(self, heard: Heard) -> None:
        self.number, self.book = heard.now, heard.book
        self.on_reset(heard.now)

    async def mend(self, store: GenerationStore, is_apart: bool) -> None:
        """Write to the store what it lacks; a node that is apart closes its generation.

        A node that has blocks of an earlier run lets those that run put theirs back first.

        Raises:
            ClusterStoreError: the store failed.
        """
        is_new = not self.is_known and not self.noted.name
        if self.lost is not None or self.has_no_book or is_new:
            await store.put_back(self.lost or 0)
        elif self.doubted is not None:
            await store.begin(later_than(self.doubted))
        elif is_apart and self.is_known:
            await store.close_generation(self.name)


def later_than(generation: int) -> int:
    """Return a later generation than this one; no other node makes an equal one, but by chance."""
    counted = (generation >> RANDOM_BITS) + 1
    return counted << RANDOM_BITS | secrets.randbits(RANDOM_BITS)


def step() -> int:
    """Return by how much a reset increases the number, so that its lower bits are random again."""
    return (1 << RANDOM_BITS) + secrets.randbits(RANDOM_BITS)


def new_book() -> int:
    """Return a book, which is smaller than all generations."""
    return 1 + secrets.randbelow((1 << RANDOM_BITS) - 1)
