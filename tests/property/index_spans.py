"""The spans of READY blocks that the index reports, against those of its model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flexkv.common.terms import Tier
from flexkv.index.residency import Residency
from tests.property.index_names import Path, key_of


def check_spans(index: Residency, tier: Tier, ready: Mapping[Path, int], places: int) -> None:
    """Compare the spans of each size that some or all places of a tier belong to.

    `ready` has the place of each READY block, and `places` is how many places the tier has.
    """
    chain = {path: at for path, at in ready.items() if path[-1] >= 0}
    for size in (1, 2, 4):
        spans = {
            path: [path[: len(path) - n] for n in reversed(range(size))]
            for path in chain
            if (len(path) - 1) % size == 0
        }
        whole = {end: span for end, span in spans.items() if chain.keys() >= set(span)}
        expected = {
            b"".join(map(key_of, (span[0][:-1], *span))): [chain[path] for path in span]
            for span in whole.values()
        }
        told = index.spans(tier, np.arange(places), size)
        assert {span.keys: span.block_ids.tolist() for span in told} == expected
        for path, at in chain.items():
            told = index.spans(tier, np.array([at]), size)
            mine = {key_of(end) for end, span in whole.items() if path in span}
            assert sorted(span.key for span in told) == sorted(mine)
