"""Block keys: equal for equal input, different otherwise, and confirmed by another hash."""

from __future__ import annotations

import hashlib
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
from flexkv.index.keys import KeyChain, Scope, block_identity, block_keys, leaf_keys
from flexkv.index.secret import DerivedSecrets, derived
from flexkv.index.slots import SlotReader
from tests.unit.xxh3 import PUBLIC_SECRET, colliding, xxh3_128

BASE: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_size": 8, "dtype": "float16"}
TOKENS = np.arange(100, 164)
PARENT = bytes(range(16))


def chain(per_block: int = 16, secret: str = "", **changes: Any) -> KeyChain:
    """Return a key chain for the base model with `changes`."""
    return KeyChain(ModelConfig(**{**BASE, **changes}).spaces(per_block)[0], secret)


def test_layers_of_other_shapes_have_other_keys() -> None:
    """Models that spread the same heads differently over their layers share no key."""
    group = {"num_layers": 1, "num_kv_heads": 2, "head_size": 8}
    tokens = np.arange(32)
    wide, narrow = group, {**group, "num_kv_heads": 1}
    spreads = [None, [wide, wide], [wide, narrow], [narrow, wide]]
    keys = {chain(layer_groups=groups).keys(tokens, None) for groups in spreads}
    assert len(keys) == len(spreads)


def test_keys_are_chained_xxh3_over_parent_and_tokens() -> None:
    """key[i] = XXH3-128(key[i-1] ‖ tokens of block i), as another implementation computes it."""
    keys = block_keys(chain().keys(TOKENS))
    for parent, key, block in zip(keys, keys[1:], TOKENS.reshape(4, 16)[1:], strict=False):
        assert key == xxh3_128(parent + block.astype("<u4").tobytes(), hash_secret(""))


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
    """Models or chains that differ in anything that changes the bytes share no key."""
    assert not set(block_keys(chain().keys(TOKENS))) & set(block_keys(other.keys(TOKENS)))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (None, "a"), ("a", "b"), (["a", "b"], ["ab"]), (["a", ""], ["a"]), ("", None),
        (["a", "b"], ["b", "a"]),
    ],
)  # fmt: skip
def test_namespaces_share_nothing(one: Any, two: Any) -> None:
    """Namespaces that differ in the division, order or emptiness of their parts share no key."""
    assert not set(block_keys(chain().keys(TOKENS, one))) & set(
        block_keys(chain().keys(TOKENS, two))
    )


def test_a_key_hangs_on_its_whole_prefix() -> None:
    """A changed token changes the key of its block and all later keys, but no earlier one."""
    changed = TOKENS.copy()
    changed[20] += 1
    one, two = (block_keys(chain().keys(tokens)) for tokens in (TOKENS, changed))
    same = [a == b for a, b in zip(one, two, strict=True)]
    assert same == [True, False, False, False]


@pytest.mark.parametrize("form", [list, torch.tensor, lambda t: t.astype(np.int32), np.asarray])
def test_every_form_of_the_same_tokens_gives_the_same_keys(form: Any) -> None:
    """Lists, tensors and arrays of any integer dtype have the same keys."""
    intake = Intake(chain())
    request = intake.request(Operation.PREFETCH, 1, form(TOKENS))
    assert request.keys == chain().keys(TOKENS)


SCOPES = [None, "tenant", Scope(extra_keys=((2, 3, "image"),)), Scope(extra_keys=((40, 50, ""),))]


@pytest.mark.parametrize("namespace", SCOPES)
@pytest.mark.parametrize("token", [-5, -1, 2**32, 2**40, 2**63 - 1])
@pytest.mark.parametrize("index", [0, 17, 63])
@pytest.mark.parametrize("form", [np.asarray, list])
def test_a_token_that_is_out_of_range_is_named(
    form: Any, index: int, token: int, namespace: Any
) -> None:
    """The error has the token's index in the prompt, its value and the rule."""
    tokens = TOKENS.copy()
    tokens[index] = token
    why = rf"token_ids\[{index}\]={token}: must be from 0 to 2\*\*32 - 1"
    with pytest.raises(ConfigError, match=why):
        chain().keys(form(tokens), namespace)
    with pytest.raises(ConfigError, match=why):
        Intake(chain()).request(Operation.GET, 1, form(tokens), None, namespace)


@pytest.mark.parametrize("token", [-5, 2**32])
def test_a_token_out_of_range_is_named_in_what_a_prompt_grows_by(token: int) -> None:
    """A bad token in a prompt's extension is named by its index in the whole prompt."""
    keys, tokens = chain().keys(TOKENS[:32]), TOKENS.copy()
    tokens[50] = token
    with pytest.raises(ConfigError, match=rf"token_ids\[50\]={token}: must be from 0"):
        chain().extend(keys, tokens)
    with pytest.raises(ConfigError, match=rf"token_ids\[50\]={token}: must be from 0"):
        chain().grown(keys, tokens[32:].tolist())


def test_the_largest_token_id_has_keys() -> None:
    """The largest token id is accepted, and its keys differ from those of the one below."""
    tokens = np.full(16, 2**32 - 1)
    assert chain().keys(tokens) != chain().keys(tokens - 1)


@pytest.mark.parametrize("tokens", [TOKENS[::2], TOKENS.astype(np.int32), [1, "2"]])
def test_tokens_of_another_form_are_refused_by_name(tokens: Any) -> None:
    """A key chain itself refuses strided arrays, other dtypes and strings by name."""
    with pytest.raises(ConfigError, match="token_ids"):
        chain().keys(tokens)


@pytest.mark.parametrize("namespace", [3, [1], ["a", None]])
def test_a_namespace_is_made_of_strings(namespace: Any) -> None:
    """A namespace that is not made of strings is refused by name."""
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
    """Errors of length, range, alignment and contiguity differ, and name index and value."""
    with pytest.raises(ConfigError, match=why):
        SlotReader([16]).read(slots, Span(0, 2, 0, 32), 4)


def test_slots_of_a_masked_run_skip_the_partial_block() -> None:
    """Slots begin at the mask's first token; its leading partial block is not moved."""
    slots = np.r_[5:16, 32:48]
    ids, _ = SlotReader([16]).read(slots, Span(1, 2, 5, 32), 4)
    assert ids.tolist() == [2]


VECTORS = json.loads((Path(__file__).parents[2] / "docs" / "key-vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_keys_are_those_of_the_published_vectors(vector: dict[str, Any]) -> None:
    """Keys equal the published vectors in every process, Python and release of a key version."""
    space, *_ = ModelConfig(**vector["model"]).spaces(vector["tokens_per_block"])
    keys = KeyChain(space, vector["secret"]).keys(
        np.array(vector["tokens"], np.int64),
        Scope(tuple(vector["namespace"]), tuple(map(tuple, vector["extra_keys"]))),
    )
    assert keys[:16].hex() == vector["root"]
    assert [key.hex() for key in block_keys(keys)] == vector["keys"]
    for group, leaves in vector.get("leaves", {}).items():
        assert [key.hex() for key in block_keys(leaf_keys(keys, int(group)))] == leaves


def hash_secret(secret: str) -> bytes:
    """Return the bytes that replace XXH3's constants, by the documented rule."""
    return expanded(secret, b"hash secret", 192)


def expanded(secret: str, purpose: bytes, size: int) -> bytes:
    """Return the bytes derived from a secret for a purpose, by the documented rule."""
    master = bytes(64)
    if secret:
        master = hashlib.scrypt(
            secret.encode(), salt=b"flexkv key_secret", n=1 << 14, r=8, p=1, dklen=64
        )
    return hashlib.shake_256(b"flexkv " + purpose + b"\0" + master).digest(size)


def named(secret: str, kind: bytes, parts: list[bytes]) -> bytes:
    """Return the name derived from some parts, by the documented rule."""
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    key = expanded(secret, b"name key", 64)
    return hashlib.blake2b(framed, digest_size=16, key=key, person=kind).digest()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vectors_follow_from_the_documented_rule(vector: dict[str, Any]) -> None:
    """An independent implementation of the rules in keys.py and secret.py gives the vectors."""
    model = ModelConfig(**vector["model"])
    facts = {
        "key_version": 3, "model_id": model.model_id, "num_layers": model.num_layers,
        "num_kv_heads": model.num_kv_heads, "head_size": model.head_size, "kv_dim": model.kv_dim,
        "dtype": model.dtype, "tokens_per_block": vector["tokens_per_block"],
    }  # fmt: skip
    if model.layer_groups:
        facts["layer_groups"] = repr(model.layer_groups)
    fingerprint = ";".join(f"{name}={value}" for name, value in facts.items()).encode()
    secret, size = vector["secret"], vector["tokens_per_block"]
    namespace = [part.encode() for part in vector["namespace"]]
    parent = named(secret, b"flexkv root", [fingerprint, *namespace])
    assert parent.hex() == vector["root"]
    for number, key in enumerate(vector["keys"]):
        begin, end = number * size, (number + 1) * size
        extras = [
            f"{first - begin}:{last - begin}:{text}".encode()
            for first, last, text in sorted(vector["extra_keys"])
            if first < end and last > begin
        ]
        if extras:
            parent = named(secret, b"flexkv extras", [parent, *extras])
        tokens = np.array(vector["tokens"][begin:end], "<u4")
        parent = xxh3_128(parent + tokens.tobytes(), hash_secret(secret))
        assert parent.hex() == key
        for group, leaves in vector.get("leaves", {}).items():
            salt = xxhash.xxh3_128(b"flexkv leaf", seed=int(group)).digest()
            assert bytes(a ^ b for a, b in zip(parent, salt, strict=True)).hex() == leaves[number]


# -- the secret ----------------------------------------------------------------------------------

PER_BLOCK = [4, 16, 28, 29, 32, 56, 57, 64, 128]
"""Block sizes for each code path of the hash, and between them."""


def last_key(tokens: list[int], per_block: int, secret: str, namespace: Any = None) -> bytes:
    """Return the key of the last block."""
    return chain(per_block, secret).keys(tokens, namespace)[-16:]


@pytest.mark.parametrize("per_block", PER_BLOCK)
@pytest.mark.parametrize("secret", ["", "one", "two"])
def test_blocks_that_collide_under_public_constants_have_keys_of_their_own(
    per_block: int, secret: str
) -> None:
    """Blocks that collide under XXH3's public constants have different keys, even without a secret.

    This holds in any namespace and anywhere in a prompt.
    """
    one, two = colliding(per_block, PUBLIC_SECRET)
    assert one != two
    packed = (PARENT + np.array(tokens, "<u4").tobytes() for tokens in (one, two))
    assert len({xxhash.xxh3_128_digest(data) for data in packed}) == 1, "no longer a test"
    front = list(range(3 * per_block))
    for namespace in SCOPES[:2]:
        for before in ([], front):
            keys = (last_key(before + each, per_block, secret, namespace) for each in (one, two))
            assert len(set(keys)) == 2


def test_the_collision_of_wide_tokens_is_refused() -> None:
    """Token ids of 64 bits are refused; they allowed collisions that zeroed a product."""
    one, two = list(range(16)), list(range(16))
    four, five = 0x78E5C0CC4EE679CB, 0x2172FFCC7DD05A82
    one[2:4] = four, 5
    two[2:4] = four + 5 - five, five
    for tokens in (one, two):
        with pytest.raises(ConfigError, match=rf"token_ids\[2\]={tokens[2]}"):
            chain(secret="s3cret").keys(tokens)


@pytest.mark.parametrize("per_block", PER_BLOCK)
def test_who_knows_the_constants_of_one_secret_knows_those_of_no_other(per_block: int) -> None:
    """Collisions made under one known secret, or under none, do not collide under another."""
    secrets = ["", "one", "two"]
    for known in secrets:
        one, two = colliding(per_block, hash_secret(known))
        for secret in secrets:
            keys = {last_key(each, per_block, secret) for each in (one, two)}
            assert len(keys) == (1 if secret == known else 2)


def test_everything_derived_differs_by_secret_and_purpose() -> None:
    """Everything derived differs by secret and purpose, even in its first 16 bytes."""
    secrets = ["", "a", "b", "ab", " a", "A", "\0", "ä"]
    parts = [bytes(part) for each in secrets for part in as_bytes(derived(each))]
    assert len({part[:16] for part in parts}) == 3 * len(secrets)


def as_bytes(found: DerivedSecrets) -> tuple[bytes, bytes, bytes]:
    """Return everything that is derived from a secret."""
    return found.hash_secret, found.name_key, bytes.fromhex(found.digest)


def test_a_secret_is_derived_from_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow derivation runs once per process and secret, and never without a secret."""
    calls: list[bytes] = []
    real = hashlib.scrypt

    def counting(password: bytes, **options: Any) -> bytes:
        calls.append(password)
        return real(password, **options)

    monkeypatch.setattr(hashlib, "scrypt", counting)
    for _ in range(3):
        for secret in ("", "a secret of this test"):
            chain(secret=secret).keys(TOKENS)
            identity = block_identity(ModelConfig(**BASE).spaces(16), secret)
            assert identity["key_secret_digest"] == derived(secret).digest
    assert calls == [b"a secret of this test"]


def test_the_digest_is_slow_to_guess_and_tells_nothing_else() -> None:
    """The digest is derived from the secret by scrypt alone, and differs from that of no secret."""
    digest = block_identity(ModelConfig(**BASE).spaces(16), "weak")["key_secret_digest"]
    assert digest == expanded("weak", b"digest", 16).hex()
    assert digest != block_identity(ModelConfig(**BASE).spaces(16), "")["key_secret_digest"]
    assert digest != xxhash.xxh3_128_hexdigest(b"".join(
        len(part).to_bytes(8, "little") + part for part in (b"secret", b"weak")
    ))  # fmt: skip


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
    ("tokens of 32 bits", {}, TOKENS + (2**32 - 1000), None),
]


def test_no_weak_key_is_shared() -> None:
    """Prompts that differ in anything share no key, with each other or with the plain prompt."""
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
    """The dtype, byte order, strides and container of tokens do not affect the keys."""
    request = Intake(chain()).request(Operation.GET, 1, tokens)
    assert request.keys == chain().keys(TOKENS)


@pytest.mark.parametrize("tokens", [[1, 2.5], [1, "2"], [1, None], [2**70]])
def test_a_list_of_other_things_is_refused(tokens: list[Any]) -> None:
    """A list of anything but 64-bit integers is refused with an error that names the field."""
    with pytest.raises(ConfigError, match="token_ids"):
        Intake(chain()).request(Operation.GET, 1, tokens)


@given(st.integers(0, 100), st.integers(0, 100))
def test_extending_hashes_only_what_is_new(known: int, more: int) -> None:
    """Extending the keys of a prefix gives the keys of the whole prompt."""
    tokens = np.arange(known + more)
    keys = chain().keys(tokens[:known])
    assert chain().extend(keys, tokens) == chain().keys(tokens)


@given(st.lists(st.tuples(st.integers(0, 70), st.integers(1, 20), st.text(max_size=3)), max_size=4))
def test_extra_keys_change_their_blocks_and_all_behind(ranges: list[tuple[int, int, str]]) -> None:
    """An extra key changes the keys from its first block on, and leaves the earlier ones alone."""
    extras = tuple((first, first + length, text) for first, length, text in ranges)
    keys = chain().keys(TOKENS, Scope(extra_keys=extras))
    same = [a == b for a, b in zip(block_keys(keys), block_keys(chain().keys(TOKENS)), strict=True)]
    first = min((extra[0] // 16 for extra in extras), default=4)
    assert same == [block < first for block in range(4)]
    assert chain().keys(TOKENS.tolist(), Scope(extra_keys=extras[::-1])) == keys


@pytest.mark.parametrize("extra", [(3, 3, "a"), (-1, 3, "a"), (0, 3, 5)])
def test_an_extra_key_needs_a_range_and_a_string(extra: Any) -> None:
    """An extra key without a valid range and a string is refused by name."""
    with pytest.raises(ConfigError, match="extra_keys"):
        chain().keys(TOKENS, Scope(extra_keys=(extra,)))
