"""Keys of leaves: each position of a prompt has another key in each KV group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from flexkv.common.config import ModelConfig
from flexkv.common.layout import is_natural
from flexkv.common.space import GROUPS_MAX
from flexkv.index.keys import KeyChain, block_identity, block_keys, fingerprint, leaf_keys

FULL = {"num_layers": 2, "num_kv_heads": 2, "head_size": 8, "layer_indices": [1, 3]}
WINDOW = {
    "num_layers": 2, "num_kv_heads": 2, "head_size": 8, "layer_indices": [0, 2],
    "kind": "sliding_window", "window": 64, "kv_group": 1,
}  # fmt: skip
STATE = {"num_layers": 1, "kind": "state", "state_bytes": 128, "kv_group": 2, "layer_indices": [4]}
PROMPT = np.arange(64)


def model_of(*groups: dict[str, Any], **changes: Any) -> ModelConfig:
    """Return a model with these layer groups."""
    layers = sum(group["num_layers"] for group in groups)
    sizes: dict[str, Any] = {"num_layers": layers, "num_kv_heads": 2, "head_size": 8}
    return ModelConfig(**{**sizes, "dtype": "float16", **changes}, layer_groups=groups)


@given(st.binary(min_size=16, max_size=16 * 9).filter(lambda each: len(each) % 16 == 0))
def test_a_leaf_key_is_the_blocks_key_with_the_groups_salt(keys: bytes) -> None:
    """The root stays, and each key is XORed with XXH3-128 of a constant, seeded by the group."""
    assert leaf_keys(keys, 0) == keys
    for group in (1, 2, GROUPS_MAX - 1):
        salt = xxhash.xxh3_128(b"flexkv leaf", seed=group).intdigest()
        leaves = leaf_keys(keys, group)
        assert leaves[:16] == keys[:16]
        for one, other in zip(block_keys(keys), block_keys(leaves), strict=True):
            assert int.from_bytes(other, "big") == int.from_bytes(one, "big") ^ salt


def test_leaves_of_all_groups_differ() -> None:
    """No two groups have a leaf with one key, nor one with a key of the chain."""
    keys = KeyChain(model_of(FULL, WINDOW).spaces(4)[0]).keys(PROMPT)
    every = [key for group in range(GROUPS_MAX) for key in block_keys(leaf_keys(keys, group))]
    assert len(set(every)) == GROUPS_MAX * 16


OTHERS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "no window": ([FULL, {**WINDOW, "kind": "full", "window": 0}, STATE], {}),
    "chunks": ([FULL, {**WINDOW, "kind": "chunked"}, STATE], {}),
    "a longer window": ([FULL, {**WINDOW, "window": 65}, STATE], {}),
    "a longer block": ([FULL, {**WINDOW, "tokens_per_block": 32}, STATE], {}),
    "other layers": (
        [{**FULL, "layer_indices": [0, 3]}, {**WINDOW, "layer_indices": [1, 2]}, STATE],
        {},
    ),
    "other numbers": ([FULL, {**WINDOW, "kv_group": 2}, {**STATE, "kv_group": 1}], {}),
    "fp8 in the window": ([FULL, {**WINDOW, "dtype": "fp8"}, STATE], {}),
    "fp8 in the chain": ([{**FULL, "dtype": "fp8"}, WINDOW, STATE], {}),
    "K and V in one": ([FULL, {**WINDOW, "kv_dim": 1}, STATE], {}),
    "a larger state": ([FULL, WINDOW, {**STATE, "state_bytes": 129}], {}),
    "another type of state": ([FULL, WINDOW, {**STATE, "dtype": "float32"}], {}),
    "one group less": ([FULL, {**WINDOW, "layer_indices": [0, 2]}], {}),
    "all in one group": ([FULL, {**WINDOW, "kv_group": 0, "kind": "full", "window": 0}], {}),
    "two ranks": ([FULL, WINDOW, STATE], {"tp_size": 2}),
    "two ranks, two slices": ([FULL, WINDOW, {**STATE, "num_kv_heads": 2}], {"tp_size": 2}),
    "another draft": ([FULL, WINDOW, STATE], {"model_id": "target+draft"}),
}


def test_models_that_differ_in_a_group_share_nothing() -> None:
    """Whatever a group is, its number included, changes every key of the chain, and the identity.

    A draft's layers are layers of the model; the weights of both are its `model_id`.
    """
    cases = {"itself": ([FULL, WINDOW, STATE], {}), **OTHERS}
    spaces = {name: model_of(*each, **more).spaces(16) for name, (each, more) in cases.items()}
    roots = {KeyChain(each[0]).keys(PROMPT)[:16] for each in spaces.values()}
    assert len(roots) == len(cases)
    identities = [block_identity(each, "") for each in spaces.values()]
    assert all(one != two for at, one in enumerate(identities) for two in identities[:at])


def test_a_difference_is_found_under_the_groups_name() -> None:
    """Two sides that differ only in a leaf group can name it; each fact is short."""
    one = block_identity(model_of(FULL, WINDOW, STATE).spaces(16), "")
    other = block_identity(model_of(FULL, {**WINDOW, "window": 32}, STATE).spaces(16), "")
    assert {name for name in one if one[name] != other[name]} == {"layer_groups", "group_1"}
    window = "kind=window;window=64;tokens_per_block=16;layers=0,2;parts=1;group=1"
    assert one["group_1"] == f"key_version=3;{window}"


@pytest.mark.parametrize(
    ("order", "natural"),
    [
        ("kv tokens heads dim|dim", True),
        ("kv tokens heads dim|kv tokens heads dim;kv tokens dim|", True),
        ("kv tokens heads dim|heads tokens kv·dim", False),
        ("heads tokens kv·dim|dim", False),
    ],
)
def test_the_order_of_every_group_counts(order: str, natural: bool) -> None:
    """An order is natural if that of each group is; otherwise it is part of the fingerprint."""
    (space, *_) = model_of(FULL, WINDOW, STATE).spaces(16)
    assert is_natural(order) == natural
    assert (fingerprint(space, order) == fingerprint(space)) == natural
