"""Runs of consecutive block ids, by which many blocks become few contiguous extents."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import InvariantError
from flexkv.common.terms import BlockIds, Tier, Transfer


def coalesce(
    source_ids: BlockIds, target_ids: BlockIds, blocks_max: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the runs in which both ids count up by one: where each starts, and its length.

    Args:
        source_ids: int64[n].
        target_ids: int64[n].
        blocks_max: most blocks of a run; longer runs are cut, counting from their start.

    Returns:
        `starts` int64[m], ascending indices into the ids, and `counts` int64[m], which add up
        to n.
    """
    assert len(source_ids) == len(target_ids), (len(source_ids), len(target_ids))
    assert blocks_max >= 1, blocks_max
    total = len(source_ids)
    if total == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if total == 1 or blocks_max == 1:
        return np.arange(total), np.ones(total, np.int64)
    breaks = np.flatnonzero((np.diff(source_ids) != 1) | (np.diff(target_ids) != 1)) + 1
    run_starts = np.concatenate(([0], breaks))
    run_counts = np.diff(run_starts, append=total)
    cuts = -(-run_counts // blocks_max)
    # For each piece: the index of its run, and its own index within that run.
    run = np.repeat(np.arange(len(run_starts)), cuts)
    nth = np.arange(len(run)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    starts = run_starts[run] + nth * blocks_max
    counts = np.minimum(run_counts[run] - nth * blocks_max, blocks_max)
    return starts, counts


def check_ids(transfer: Transfer, host_blocks: int, outer_blocks: int) -> None:
    """Check that a transfer has as many source as target ids, and that all are in their pools.

    `host_blocks` is how many blocks host memory has, `outer_blocks` how many the other end has.

    Raises:
        InvariantError: one of these does not hold.
    """
    if len(transfer.source_ids) != len(transfer.target_ids):
        raise InvariantError(
            f"transfer {transfer.op_id} {transfer.route}: {len(transfer.source_ids)} source ids "
            f"but {len(transfer.target_ids)} target ids"
        )
    if transfer.block_count == 0:
        return
    ends = (Tier.HOST, host_blocks), (transfer.route.outer, outer_blocks)
    for ids, (end, blocks) in zip(transfer.sides, ends, strict=True):
        if blocks > ids[0] >= 0 and len(ids) == 1:
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= blocks:
            raise InvariantError(
                f"transfer {transfer.op_id} {transfer.route}: {end.label} ids {low}..{high} are "
                f"not all in its {blocks} blocks"
            )
