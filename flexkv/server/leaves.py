"""The device blocks of leaves, from requests to messages and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import ConfigError
from flexkv.common.request import NO_BLOCK, LeafBlocks
from flexkv.common.space import BlockSpace
from flexkv.common.terms import BlockIds, positions_of
from flexkv.server.wire import LEAVES_MAX, LeafIds

GAP = 64
"""A run does not end at a gap of up to this many positions without a block."""


def leaf_ids(leaves: Sequence[LeafBlocks]) -> tuple[LeafIds, ...]:
    """Return leaves as a message has them: in runs of positions at equal distances."""
    runs = tuple(run for each in leaves for run in _runs_of(each, GAP))
    if len(runs) > LEAVES_MAX:
        runs = tuple(run for each in leaves for run in _runs_of(each, None))
    return runs


def _runs_of(leaves: LeafBlocks, gap: int | None) -> Iterator[LeafIds]:
    """Yield the runs of one group, split at gaps of more than `gap` positions; None: one run."""
    group, positions, ids = leaves
    count, places = positions.block_count, positions.places
    if places is None or count < 2:
        if count:
            yield LeafIds(group, positions.at(0), 1, ids.tobytes())
        return
    distances = np.diff(places)
    step = int(np.gcd.reduce(distances))
    ends = [] if gap is None else (np.flatnonzero(distances > gap * step) + 1).tolist()
    for begin, end in zip([0, *ends], [*ends, count], strict=True):
        at = (places[begin:end] - places[begin]) // step
        run = np.full(int(at[-1]) + 1, NO_BLOCK, np.int64)
        run[at] = ids[begin:end]
        yield LeafIds(group, int(places[begin]), step, run.tobytes())


def leaf_blocks(
    runs: Sequence[LeafIds], blocks: int, spaces: Sequence[BlockSpace]
) -> tuple[LeafBlocks, ...]:
    """Return the leaves of a message, without the positions that have no block.

    Args:
        runs: what another process has sent.
        blocks: how many blocks of the chain its request names.
        spaces: those of the model's KV groups.

    Raises:
        ConfigError: they break a rule.
    """
    groups: dict[int, list[LeafIds]] = {}
    last_group = end = 0
    for number, run in enumerate(runs):
        field = f"leaves[{number}]"
        begin = end if run.group == last_group else 0
        end = _check_run(field, run, begin, blocks, spaces)
        if run.group < last_group:
            raise ConfigError(f"{field}.group", run.group, "must not be less than the one before")
        last_group = run.group
        groups.setdefault(run.group, []).append(run)
    return tuple([_joined(group, each) for group, each in groups.items()])


def _check_run(
    field: str, run: LeafIds, begin: int, blocks: int, spaces: Sequence[BlockSpace]
) -> int:
    """Check where a run is, and return the position behind it.

    Raises:
        ConfigError: it has no ids or parts of one, its group does not exist, or a position is
            before `begin`, behind the chain's blocks, or where no leaf of the group can be.
    """
    if run.group >= len(spaces):
        raise ConfigError(
            f"{field}.group", run.group, f"must be less than the number of KV groups, {len(spaces)}"
        )
    count, rest = divmod(len(run.ids), 8)
    if rest or not count:
        why = "must be one id of 8 bytes for each position, and at least one"
        raise ConfigError(f"{field}.ids", f"{len(run.ids)} bytes", why)
    last = run.first + (count - 1) * run.step
    if not begin <= run.first <= last < blocks:
        why = f"must be from {begin} to {blocks - 1}, ascending in each group"
        raise ConfigError(field, f"positions {run.first} to {last}", why)
    ratio = spaces[run.group].tokens_per_block // spaces[0].tokens_per_block
    if (run.first + 1) % ratio or (count > 1 and run.step % ratio):
        why = f"must be where blocks of KV group {run.group} end: every {ratio} blocks of the chain"
        raise ConfigError(field, f"positions {run.first} to {last} by {run.step}", why)
    return last + 1


def _joined(group: int, runs: Sequence[LeafIds]) -> LeafBlocks:
    """Return the blocks in the runs of one group.

    Raises:
        ConfigError: a device block is named twice, or is negative.
    """
    ids = np.concatenate([np.frombuffer(run.ids, np.int64) for run in runs])
    at = np.concatenate([_positions(run) for run in runs])
    given = ids != NO_BLOCK
    ids, at = ids[given], at[given]
    if len(ids) and ids.min() < 0:
        why = f"must not be negative, except {NO_BLOCK} where there is no block"
        raise ConfigError("leaves", int(ids.min()), why)
    if has_twice(ids):
        why = f"must not name a device block of KV group {group} twice"
        raise ConfigError("leaves", f"{len(ids)} ids", why)
    return LeafBlocks(group, positions_of(at), ids)


def _positions(run: LeafIds) -> NDArray[np.int64]:
    return run.first + run.step * np.arange(len(run.ids) // 8)


FEW = 64


def has_twice(ids: BlockIds) -> bool:
    """Return whether an id occurs twice."""
    if len(ids) <= FEW:  # for few ids a set is faster than sorting
        return len(set(ids.tolist())) < len(ids)
    ordered = np.sort(ids)
    return bool((ordered[1:] == ordered[:-1]).any())
