"""Which blocks of a device are read by puts, and which were computed before a reset."""

from __future__ import annotations

import numpy as np

from flexkv.integration.common.device_blocks import DeviceBlocks


def test_a_block_is_read_until_every_put_of_it_has_ended() -> None:
    """A block is read while any put of it is under way, and none is when all puts have ended."""
    blocks, one, both = DeviceBlocks(), np.array([1]), np.array([0, 1])
    assert not blocks.any_read
    blocks.begin_puts([one, both], num_blocks=3)
    blocks.end_put(both)
    assert [blocks.are_read(np.array([block])) for block in range(3)] == [False, True, False]
    assert blocks.any_read
    blocks.end_put(one)
    assert not blocks.are_read(both)
    assert not blocks.any_read


def test_blocks_of_before_a_reset_are_old_until_they_are_written_behind_new_ones() -> None:
    """A block that is written behind an old one stays old, and is new behind new ones only."""
    blocks = DeviceBlocks()
    blocks.begin_puts([], num_blocks=4)
    blocks.written([0, 1], 0)
    assert not blocks.was_reset
    assert not blocks.are_old([0, 1])
    blocks.reset()
    assert blocks.was_reset
    assert blocks.are_old([0])
    blocks.written([0, 1, 2], 1)
    assert blocks.are_old([1])
    blocks.written([0, 1, 2], 0)
    assert not blocks.are_old([0, 1, 2])
    assert blocks.are_old([0, 3])
    assert blocks.are_old([9])  # the device may turn out to be larger


def test_a_null_block_is_never_old() -> None:
    """Null blocks do not make later blocks old: only the real blocks before them count."""
    blocks = DeviceBlocks(has_null=True)
    blocks.reset()
    assert not blocks.are_old([0, 0])
    blocks.written([0, 0, 1], 2)
    assert not blocks.are_old([0, 1])
    blocks.written([0, 2, 3], 2)
    assert blocks.are_old([0, 3])
