"""Block keys: the same for the same, different for anything else; an independent hash agrees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation, Span
from flexkv.index.intake import Intake
from flexkv.index.keys import KeyChain, Scope, block_keys

BASE: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_size": 8, "dtype": "float16"}
TOKENS = np.arange(100, 164)


def chain(per_block: int = 16, secret: str = "", **changes: Any) -> KeyChain:
    """Give a key chain whose model differs from the base in `changes`."""
    return KeyChain(ModelConfig(**{**BASE, **changes}), per_block, secret)


def test_keys_are_chained_xxh3_over_parent_and_tokens() -> None:
    """key[i] = XXH3-128(key[i-1] ‖ tokens of block i), by another implementation."""
    keys = block_keys(chain().keys(TOKENS))
    for parent, key, block in zip(keys, keys[1:], TOKENS.reshape(4, 16)[1:], strict=False):
        assert key == xxhash.xxh3_128_digest(parent + block.astype("<u4").tobytes())


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


VECTORS = json.loads((Path(__file__).parents[2] / "docs" / "key-vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_keys_are_those_of_the_published_vectors(vector: dict[str, Any]) -> None:
    """The same tokens give the same keys in every process, Python and release of a key version."""
    keys = KeyChain(
        ModelConfig(**vector["model"]), vector["tokens_per_block"], vector["secret"]
    ).keys(
        np.array(vector["tokens"], np.int64),
        Scope(tuple(vector["namespace"]), tuple(map(tuple, vector["extra_keys"]))),
    )
    assert keys[:16].hex() == vector["root"]
    assert [key.hex() for key in block_keys(keys)] == vector["keys"]


def test_a_vector_follows_from_the_documented_rule() -> None:
    """The rule at the top of keys.py, followed by another implementation of XXH3."""
    vector = VECTORS[1]
    model = vector["model"]
    facts = {
        "key_version": 2, "model_id": "", **model, "kv_dim": 2,
        "tokens_per_block": vector["tokens_per_block"],
    }  # fmt: skip
    order = ("key_version", "model_id", "num_layers", "num_kv_heads", "head_size", "kv_dim",
             "dtype", "tokens_per_block")  # fmt: skip
    fingerprint = ";".join(f"{name}={facts[name]}" for name in order)
    parts = [vector["secret"], fingerprint, *vector["namespace"]]
    framed = b"".join(len(part).to_bytes(8, "little") + part.encode() for part in parts)
    parent = xxhash.xxh3_128_digest(framed)
    assert parent.hex() == vector["root"]
    for block, key in zip(np.reshape(vector["tokens"], (-1, 4)), vector["keys"], strict=True):
        parent = xxhash.xxh3_128_digest(parent + block.astype("<u4").tobytes())
        assert parent.hex() == key


IMAGE = Scope(extra_keys=((2, 30, "image-a"),))
SHIFTED = np.concatenate([[7], TOKENS[:-1]])
SWAPPED = TOKENS[[1, 0, *range(2, 64)]]
WEAK: list[tuple[str, dict[str, Any], Any, Any]] = [
    ("namespace", {}, TOKENS, "tenant"),
    ("namespace case", {}, TOKENS, "Tenant"),
    ("two parts", {}, TOKENS, ["ten", "ant"]),
    ("parts swapped", {}, TOKENS, ["ant", "ten"]),
    ("empty part after", {}, TOKENS, ["tenant", ""]),
    ("empty part before", {}, TOKENS, ["", "tenant"]),
    ("empty namespace", {}, TOKENS, ""),
    ("two empty parts", {}, TOKENS, ["", ""]),
    ("separator in a part", {}, TOKENS, "ten;ant"),
    ("nul in a part", {}, TOKENS, "tenant\0"),
    ("block size", {"per_block": 32}, TOKENS, None),
    ("dtype", {"dtype": "bfloat16"}, TOKENS, None),
    ("layers", {"num_layers": 3}, TOKENS, None),
    ("heads", {"num_kv_heads": 4}, TOKENS, None),
    ("head size", {"head_size": 16}, TOKENS, None),
    ("model", {"model_id": "other"}, TOKENS, None),
    ("mla", {"use_mla": True}, TOKENS, None),
    ("secret", {"secret": "s"}, TOKENS, None),
    ("secret moved into the namespace", {}, TOKENS, "s"),
    ("shifted tokens", {}, SHIFTED, None),
    ("swapped tokens", {}, SWAPPED, None),
    ("an image", {}, TOKENS, IMAGE),
    ("another image", {}, TOKENS, Scope(extra_keys=((2, 30, "image-b"),))),
    ("the image elsewhere", {}, TOKENS, Scope(extra_keys=((3, 31, "image-a"),))),
    ("the image as two", {}, TOKENS, Scope(extra_keys=((2, 9, "image-a"), (9, 30, "image-a")))),
    ("token over 32 bits", {}, TOKENS + 2**32, None),
]


def test_no_weak_key_is_shared() -> None:
    """Prompts that differ in anything share no key, with each other or a plain one."""
    owner: dict[bytes, str] = {}
    for name, changes, tokens, namespace in [("plain", {}, TOKENS, None), *WEAK]:
        for key in set(block_keys(chain(**changes).keys(np.asarray(tokens), namespace))):
            other = owner.setdefault(key, name)
            assert other == name, f"{name} shares a key with {other}"
    assert len(WEAK) >= 24


@pytest.mark.parametrize(
    "tokens",
    [
        TOKENS.astype(np.int32), TOKENS.astype(np.uint16), TOKENS.tolist(), tuple(TOKENS.tolist()),
        torch.from_numpy(TOKENS), torch.from_numpy(TOKENS.astype(np.int32)), TOKENS.astype(">i8"),
        np.repeat(TOKENS, 2)[::2],
    ],
)  # fmt: skip
def test_the_same_tokens_give_the_same_keys_in_any_form(tokens: Any) -> None:
    """dtype, byte order, strides and container do not matter."""
    request = Intake(chain(), 16).request(Operation.GET, 1, tokens)
    assert request.keys == chain().keys(TOKENS)


@pytest.mark.parametrize("tokens", [[1, 2.5], [1, "2"], [1, None], [2**70]])
def test_a_list_of_other_things_is_refused(tokens: list[Any]) -> None:
    """The error names the field."""
    with pytest.raises(ConfigError, match="token_ids"):
        Intake(chain(), 16).request(Operation.GET, 1, tokens)


@given(st.integers(0, 100), st.integers(0, 100))
def test_extending_hashes_only_what_is_new(known: int, more: int) -> None:
    """Keys of a grown prompt are those of its blocks before, and new ones behind."""
    tokens = np.arange(known + more)
    keys = chain().keys(tokens[:known])
    assert chain().extend(keys, tokens) == chain().keys(tokens)


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20), st.text(max_size=3)), max_size=4))
def test_extra_keys_change_their_blocks_and_all_behind(ranges: list[tuple[int, int, str]]) -> None:
    """Blocks before the first extra key are shared with the plain prompt, no other is."""
    extras = tuple((first, first + length, text) for first, length, text in ranges)
    keys = chain().keys(TOKENS, Scope(extra_keys=extras))
    same = [a == b for a, b in zip(block_keys(keys), block_keys(chain().keys(TOKENS)), strict=True)]
    first = min((extra[0] // 16 for extra in extras), default=4)
    assert same == [block < first for block in range(4)]
    assert chain().keys(TOKENS.tolist(), Scope(extra_keys=extras[::-1])) == keys


@pytest.mark.parametrize("extra", [(3, 3, "a"), (-1, 3, "a"), (0, 3, 5)])
def test_an_extra_key_needs_a_range_and_a_string(extra: Any) -> None:
    """The error names the field and the value."""
    with pytest.raises(ConfigError, match="extra_keys"):
        chain().keys(TOKENS, Scope(extra_keys=(extra,)))
