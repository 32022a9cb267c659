"""Arguments of a request become whole blocks, or an error that names the fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkv.common.errors import ConfigError
from flexkv.common.request import as_int64, whole_blocks


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3],
        np.array([1, 2, 3], np.int32),
        np.array([1, 2, 3], np.uint16),
        np.array([1, 9, 2, 9, 3], np.int64)[::2],
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 2, 3], dtype=torch.int32),
    ],
)
def test_every_integer_form_is_the_same_array(values: object) -> None:
    """Lists, arrays and tensors of any integer dtype and stride become contiguous int64 arrays."""
    array = as_int64("token_ids", values)
    assert array.dtype == np.int64
    assert array.flags.c_contiguous
    assert array.tolist() == [1, 2, 3]


def test_an_int64_array_is_not_copied() -> None:
    """An int64 array is used without a copy."""
    values = np.arange(8)
    assert np.shares_memory(as_int64("token_ids", values), values)


@pytest.mark.parametrize(
    "values", [[[1, 2]], [1.5], np.array([True]), "text", np.zeros((2, 2), np.int64), [None]]
)
def test_what_is_not_one_row_of_integers_is_refused_by_name(values: object) -> None:
    """What is not one row of integers is refused with an error that names the argument."""
    with pytest.raises(ConfigError) as caught:
        as_int64("token_ids", values)
    assert caught.value.field == "token_ids"


@given(st.integers(0, 70), st.integers(0, 70), st.integers(0, 70), st.sampled_from([1, 4, 16]))
def test_a_span_is_the_whole_blocks_inside_the_run(
    leading: int, run: int, trailing: int, per_block: int
) -> None:
    """A span has exactly the blocks whose tokens are all selected."""
    mask = np.array([False] * leading + [True] * run + [False] * trailing, np.bool_)
    span = whole_blocks(mask, len(mask), per_block)
    whole = [
        block
        for block in range(len(mask) // per_block)
        if mask[block * per_block : (block + 1) * per_block].all()
    ]
    assert list(range(span.first_block, span.last_block)) == whole
    assert int(mask.sum()) == (span.last_token - span.first_token)


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        ([True, False, True], "unbroken run"),
        ([True, True], "length"),
        ([1, 1, 1], "bool"),
        ([[True], [True], [True]], "length"),
    ],
)
def test_a_mask_that_breaks_a_rule_is_refused(mask: object, why: str) -> None:
    """Masks with holes, wrong lengths or wrong dtypes are refused with different reasons."""
    with pytest.raises(ConfigError, match=why):
        whole_blocks(np.array(mask), 3, 1)
