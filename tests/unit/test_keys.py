"""Block keys: the same for the same, different for anything else; an independent hash agrees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation, Span
from flexkv.index.intake import Intake
from flexkv.index.keys import KeyChain, block_keys

BASE: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_size": 8, "dtype": "float16"}
TOKENS = np.arange(100, 164)


def chain(per_block: int = 16, secret: str = "", **changes: Any) -> KeyChain:
    """Give a key chain whose model differs from the base in `changes`."""
    return KeyChain(ModelConfig(**{**BASE, **changes}), per_block, secret)


def test_keys_are_chained_xxh3_over_parent_and_tokens() -> None:
    """key[i] = XXH3-128(key[i-1] ‖ tokens of block i), by another implementation."""
    keys = block_keys(chain().keys(TOKENS))
    for parent, key, block in zip(keys, keys[1:], TOKENS.reshape(4, 16)[1:], strict=False):
        assert key == xxhash.xxh3_128_digest(parent + block.astype("<i8").tobytes())


@pytest.mark.parametrize(
    "other",
    [
        chain(dtype="bfloat16"),
        chain(num_layers=3),
        chain(head_size=16),
        chain(model_id="other"),
        chain(use_mla=True),
        chain(per_block=32),
        chain(secret="s"),
    ],
)
def test_whatever_changes_the_bytes_changes_every_key(other: KeyChain) -> None:
    """Another model, dtype, block size or secret shares no key."""
    assert not set(block_keys(chain().keys(TOKENS))) & set(block_keys(other.keys(TOKENS)))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (None, "a"), ("a", "b"), (["a", "b"], ["ab"]), (["a", ""], ["a"]), ("", None),
        (["a", "b"], ["b", "a"]),
    ],
)  # fmt: skip
def test_namespaces_share_nothing(one: Any, two: Any) -> None:
    """Parts are framed: concatenation, order and emptiness all count."""
    assert not set(block_keys(chain().keys(TOKENS, one))) & set(
        block_keys(chain().keys(TOKENS, two))
    )


def test_a_key_hangs_on_its_whole_prefix() -> None:
    """A changed token changes its block's key and all later ones, and no earlier one."""
    changed = TOKENS.copy()
    changed[20] += 1
    one, two = (block_keys(chain().keys(tokens)) for tokens in (TOKENS, changed))
    same = [a == b for a, b in zip(one, two, strict=True)]
    assert same == [True, False, False, False]


@pytest.mark.parametrize("form", [list, torch.tensor, lambda t: t.astype(np.int32), np.asarray])
def test_every_form_of_the_same_tokens_gives_the_same_keys(form: Any) -> None:
    """Lists, torch and any integer dtype hash alike."""
    intake = Intake(chain(), 16)
    request = intake.request(Operation.PREFETCH, 1, form(TOKENS))
    assert request.keys == chain().keys(TOKENS)


def test_a_negative_token_is_named() -> None:
    """The error has the index, the value and the rule."""
    tokens = TOKENS.copy()
    tokens[63] = -5
    with pytest.raises(ConfigError, match=r"token_ids\[63\]=-5: must not be negative"):
        chain().keys(tokens)


@pytest.mark.parametrize("namespace", [3, [1], ["a", None]])
def test_a_namespace_is_made_of_strings(namespace: Any) -> None:
    """Anything else is refused by name."""
    with pytest.raises(ConfigError, match="namespace"):
        chain().keys(TOKENS, namespace)


@pytest.mark.parametrize(
    ("slots", "why"),
    [
        (np.arange(31), "one slot per selected token: 32"),
        (np.arange(32) + 64, r"slot_mapping\[0\]=64: is not a slot"),
        (np.arange(32) - 1, r"slot_mapping\[0\]=-1: is not a slot"),
        (np.arange(32) + 4, r"slot_mapping\[0\]=4: must be the first slot"),
        (np.r_[0:16, 16:31, 5], r"slot_mapping\[31\]=5: must follow"),
    ],
)
def test_slots_that_break_a_rule_are_named(slots: Any, why: str) -> None:
    """Length, range, alignment and contiguity are told apart, with index and value."""
    with pytest.raises(ConfigError, match=why):
        Intake(chain(), 16).device_ids(slots, Span(0, 2, 0, 32), 4)


def test_slots_of_a_masked_run_skip_the_partial_block() -> None:
    """Slots begin with the mask's first token; the partial block in front does not move."""
    slots = np.r_[5:16, 32:48]
    ids = Intake(chain(), 16).device_ids(slots, Span(1, 2, 5, 32), 4)
    assert ids.tolist() == [2]
