"""Hints of what others hold: memory, and what they add to the match of a 32k-token prompt.

Limits: 12 bytes a pair; 1 us added to a match if nothing of the prompt is far, 25 us if all of it
is. The table is full, as many pairs as it was opened for: every span looked at is a cache miss.
There are no peers, because their code does not run in this harness.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import Figures, Options, median_ratio, seconds_of
from flexkv.common.terms import BLOCK_KEY_BYTES, Positions, Tier
from flexkv.index.hints import STORE, HintedCatalogue, Hints
from flexkv.index.residency import Residency
from flexkv.index.spans import rows_of, span_keys

BLOCKS, SPAN = 2_048, 8
"""A prompt of 32k tokens in blocks of 16, and the blocks of a span."""
BATCH_PROMPTS, NODE = 16, 1
NOBODY: frozenset[Tier] = frozenset()


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    pairs = 1 << 16 if options.quick else 25_000_000
    prompts = _Prompts(pairs)
    before = _resident_bytes()
    hints = Hints(pairs, SPAN)
    noted_s = 0.0
    for keys in prompts.batches():
        begin_s = time.perf_counter()
        hints.note(STORE, keys)
        noted_s += time.perf_counter() - begin_s
    counts = hints.counts()
    figures: Figures = {
        f"bytes a pair, {pairs} pairs (at most 12)": (_resident_bytes() - before) / len(hints),
        "pairs lost, of a million": 1e6 * counts.lost / pairs,
        "note, ns a pair": 1e9 * noted_s / pairs,
    }
    figures |= _matches(hints, prompts, options)
    return figures | _deaths(hints, prompts)


class _Prompts:
    """Random keys of spans, and prompts made of some of them."""

    def __init__(self, pairs: int) -> None:
        self._random = np.random.default_rng(0)
        self._pairs = pairs
        self.far: list[bytes] = []

    def batches(self) -> Iterator[bytes]:
        """Yield the keys of as many spans as there are pairs; keep some prompts that have them."""
        batch = BATCH_PROMPTS * BLOCKS // SPAN
        every = max(1, self._pairs // batch // 64)
        for number, begin in enumerate(range(0, self._pairs, batch)):
            keys = self._random.bytes(BLOCK_KEY_BYTES * min(batch, self._pairs - begin))
            if number % every == 0 and len(keys) == BLOCK_KEY_BYTES * batch:
                self.far.append(self._prompt_of(keys))
            yield keys

    def unknown(self) -> bytes:
        """Return a prompt of which nothing is far."""
        return self._random.bytes(BLOCK_KEY_BYTES * (1 + BLOCKS))

    def _prompt_of(self, spans: bytes) -> bytes:
        rows = rows_of(self.unknown()).copy()
        ends = np.frombuffer(spans, np.uint8).reshape(-1, BLOCK_KEY_BYTES)
        rows[SPAN::SPAN] = ends[: BLOCKS // SPAN]
        return rows.tobytes()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _matches(hints: Hints, prompts: _Prompts, options: Options) -> Figures:
    """Time matches in the index, each with the look-up of what is far behind it, in turns.

    Of some prompts all blocks are in the index; of some the first half is and nothing is far, as of
    a conversation that goes on; of some nothing is in the index and all is far.
    """
    index = Residency({Tier.HOST: 1 << (15 if options.quick else 20)})
    catalogue = HintedCatalogue(hints)
    count = min(len(prompts.far), index.counts(Tier.HOST).capacity // BLOCKS // 2)
    here = [prompts.unknown() for _ in range(2 * count)]
    for number, keys in enumerate(here):
        stored = Positions(0, BLOCKS if number < count else BLOCKS // 2)
        index.commit(Tier.HOST, index.reserve(Tier.HOST, keys, stored))
    kinds = {"here": here[:count], "half": here[count:], "far": prompts.far[:count]}
    matched: dict[str, list[float]] = {name: [] for name in kinds}
    added: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(60 * options.repeats):
        for name, some in kinds.items():
            keys = some[number % count]
            begin = time.perf_counter_ns()
            found = index.find(keys)
            matched_at = time.perf_counter_ns()
            if found.last < BLOCKS and not catalogue.is_empty:
                catalogue.far(keys, found.last, BLOCKS, NOBODY)
            added[name].append((time.perf_counter_ns() - matched_at) / 1e3)
            matched[name].append((matched_at - begin) / 1e3)
    return {
        "match of 32k, all is here, every time another, us": statistics.median(matched["here"]),
        "added to a match if nothing is far (at most 1), us": statistics.median(added["half"]),
        "added to a match if all is far (at most 25), us": statistics.median(added["far"]),
        "added if all is far / match, all is here": median_ratio(added["far"], matched["here"]),
    }


def _deaths(hints: Hints, prompts: _Prompts) -> Figures:
    """Time the death of a node that has a share of what the store has."""
    for keys in prompts.far:
        hints.note(NODE, span_keys(keys, 0, BLOCKS, SPAN))
    retired_s = seconds_of(lambda: hints.retire(NODE))
    return {
        "retire a holder, us": 1e6 * retired_s,
        "scrub of the whole table, ms": 1e3 * seconds_of(lambda: hints.scrub(1 << 40)),
    }
