"""What the remote tier has asked of its store: requests and bytes cost money."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec


class RemoteCounts(msgspec.Struct, frozen=True):
    """A snapshot of the counts since the tier was opened.

    Attributes:
        requests: requests sent, by kind ("get", "put", "head", "list", "delete", "touch",
            "exist"), repeated and hedged ones included.
        failures: requests that failed, by kind.
        retries: requests that repeat one that failed, by kind.
        read_bytes: bytes of answers that arrived whole.
        written_bytes: bytes of objects that were created.
        hedges: gets that were sent a second time because the first was slow.
        hedges_won: those whose answer came first.
        busy: answers by which the store asked for fewer requests.
        missing: spans that the store did not have.
        existing: puts of spans that the store had already.
        wrong: answers with other bytes than were stored, or too few of them.
        deleted: objects that were deleted because they were proved wrong.
        gets_limit: spans that may be read at once now.
        puts_limit: spans that may be written at once now.
    """

    requests: dict[str, int]
    failures: dict[str, int]
    retries: dict[str, int]
    read_bytes: int
    written_bytes: int
    hedges: int
    hedges_won: int
    busy: int
    missing: int
    existing: int
    wrong: int
    deleted: int
    gets_limit: int
    puts_limit: int


_NAMES = RemoteCounts.__struct_fields__
_NUMBERS = _NAMES[3:-2]


@dataclass
class Counting:
    """The counts while they are made; `other` has those that are not by kind, by their names."""

    requests: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    other: Counter[str] = field(default_factory=Counter)

    def snapshot(self, gets_limit: int, puts_limit: int) -> RemoteCounts:
        """Return the counts as they are now."""
        by_kind = (dict(each) for each in (self.requests, self.failures, self.retries))
        numbers = (self.other[name] for name in _NUMBERS)
        values = (*by_kind, *numbers, gets_limit, puts_limit)
        return msgspec.convert(dict(zip(_NAMES, values, strict=True)), RemoteCounts)
