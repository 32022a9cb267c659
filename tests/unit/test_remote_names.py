"""Names of objects, seals, addresses of stores, and the spans of transfers."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.common.terms import BlockNames, Positions, Route, Tier, Transfer
from flexkv.io.remote.address import parse_address
from flexkv.io.remote.names import Pool, PoolDescription
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.seal import SEAL_BYTES, BlockName, seal, sealed_blocks, sums_in
from flexkv.io.remote.spans import parts_of

KEY, PARENT = bytes(range(16)), bytes(range(100, 116))
NAME = BlockName(KEY, PARENT)
DESCRIPTION = PoolDescription({"model": "m", "key_secret_digest": "d"}, (4096, 512), 8)


def seals_of(*seals: bytes) -> np.ndarray:
    """Return seals as uint8[n, SEAL_BYTES]."""
    return np.frombuffer(b"".join(seals), np.uint8).reshape(-1, SEAL_BYTES)


def test_a_seal_has_a_fixed_form() -> None:
    """The bytes of a seal are part of the format: other versions and machines read them."""
    made = seal(NAME, 4096, 0x0123456789ABCDEF)
    assert made[:56].hex() == (
        "464b5673" "0100" "0000" "0010000000000000"
        "000102030405060708090a0b0c0d0e0f" "6465666768696a6b6c6d6e6f70717273"
        "efcdab8967452301"
    )  # fmt: skip
    assert len(made) == SEAL_BYTES
    assert made[56:].hex() == "fd8678a3adf84459"


def test_seals_are_believed_up_to_the_first_that_is_wrong() -> None:
    """A seal of another block, size or parent ends the run; so does the end of the seals."""
    other = BlockName(PARENT, KEY)
    right = [seal(NAME, 4096, 7), seal(other, 4096, 8), seal(NAME, 4096, 9)]
    names = [NAME, other, NAME]
    assert sealed_blocks(seals_of(*right), names, 4096) == 3
    assert sums_in(seals_of(*right)).tolist() == [7, 8, 9]
    assert sealed_blocks(seals_of(*right[:2]), names, 4096) == 2
    assert sealed_blocks(seals_of(*right), [NAME, NAME, NAME], 4096) == 1
    assert sealed_blocks(seals_of(*right), [other, other, NAME], 4096) == 0
    assert sealed_blocks(seals_of(*right), names, 4097) == 0


@given(st.integers(0, SEAL_BYTES * 8 - 1))
def test_no_bit_of_a_seal_may_differ(bit: int) -> None:
    """A seal with one bit flipped, whichever it is, is no seal."""
    made = bytearray(seal(NAME, 4096, 7))
    made[bit // 8] ^= 1 << bit % 8
    assert sealed_blocks(seals_of(bytes(made)), [NAME], 4096) == 0


def test_objects_are_named_by_pool_shard_and_key() -> None:
    """A name is the pool's digest, the first byte of the key, the key; and leads back to it."""
    pool = Pool(DESCRIPTION)
    name = pool.object_name(PARENT)
    assert name == f"{pool.name}/64/{PARENT.hex()}"
    assert name.startswith(pool.shard(0x64))
    assert pool.span_key(name) == PARENT
    for wrong in (
        pool.description_name,
        name[:-1],
        name.replace("/64/", "/65/"),
        name.upper(),
        f"{name}.tmp",
        "0" * 32 + name[32:],
    ):
        assert pool.span_key(wrong) is None


@pytest.mark.parametrize(
    "other",
    [
        {"block_identity": {"model": "n", "key_secret_digest": "d"}},
        {"block_bytes": (4096, 513)},
        {"span_blocks": 4},
        {"generation": 1},
        {"version": 2},
    ],
)
def test_what_differs_is_another_pool_and_is_refused_by_name(other: dict[str, object]) -> None:
    """Each field changes the pool's name; a description that differs is refused with the field."""
    pool, another = Pool(DESCRIPTION), Pool(replace(DESCRIPTION, **other))
    assert pool.name != another.name
    pool.check(pool.encoded)
    field = "model" if "block_identity" in other else next(iter(other))
    with pytest.raises(ConfigError, match=f"{field} is .* there and .* here"):
        pool.check(another.encoded)


def test_the_name_of_a_pool_is_part_of_the_format() -> None:
    """The same description has the same name in every process, whatever the order of its facts."""
    assert Pool(DESCRIPTION).name == "062197289c5ace67036e45e1181a2127"
    facts = dict(reversed(DESCRIPTION.block_identity.items()))
    assert Pool(replace(DESCRIPTION, block_identity=facts)).name == Pool(DESCRIPTION).name


@pytest.mark.parametrize("found", [b"", b"{}", b"[1]", b'{"block_bytes": [0]}', b"\xff"])
def test_a_description_that_cannot_be_read_is_refused(found: bytes) -> None:
    """What is no description of a pool is a ConfigError that names the object."""
    with pytest.raises(ConfigError, match=r"pool\.json"):
        Pool(DESCRIPTION).check(found)


# -- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "custom", "kind", "shown", "config"),
    [
        ("s3://b/p/", {}, "s3", "s3://b/p", {}),
        (
            "s3://flexkv-cache/",
            {"endpoint": "s3.amazonaws.com", "bucket": "flexkv-cache"},
            "s3",
            "s3://flexkv-cache",
            {},
        ),
        ("s3://b", {"endpoint": "minio:9000"}, "s3", "s3://b", {"endpoint": "https://minio:9000"}),
        ("s3:///p", {"bucket": "b", "access_key": "A"}, "s3", "s3://b/p", {"access_key_id": "A"}),
        ("gs://b/p", {"endpoint": "https://h"}, "gs", "gs://b/p", {"base_url": "https://h"}),
        ("az://c/p", {"account_name": "a"}, "az", "az://c/p", {"account_name": "a"}),
        ("memory://", {}, "memory", "memory://", {}),
        ("file:///mnt/kv", {}, "directory", "/mnt/kv", {}),
    ],
)
def test_addresses(
    url: str, custom: dict[str, str], kind: str, shown: str, config: dict[str, str]
) -> None:
    """A URL and options say which store it is, and what its client is called with."""
    address = parse_address(url, custom)
    assert (address.kind, address.url, address.config) == (kind, shown, config)
    assert not address.client_options


@pytest.mark.parametrize(
    ("url", "custom", "field"),
    [
        ("ftp://b", {}, "remote_cache_path"),
        ("/mnt/kv", {}, "remote_cache_path"),
        ("s3://", {}, "remote_cache_path"),
        ("file://host/dir", {}, "remote_cache_path"),
        ("file:///", {}, "remote_cache_path"),
        ("s3://b?sig=SECRET", {}, "remote_cache_path"),
        ("s3://SECRET:SECRET@b/p", {}, "remote_cache_path"),
        ("s3://b", {"bucket": "c"}, "remote_config_custom.bucket"),
        ("s3://b", {"endpoint": "ftp://h"}, "remote_config_custom.endpoint"),
        ("s3://b", {"endpoint": "https://SECRET@h"}, "remote_config_custom.endpoint"),
        ("s3://b", {"endpoint": "http://h:port"}, "remote_config_custom.endpoint"),
        ("s3://b", {"endpoint": "http://h:0"}, "remote_config_custom.endpoint"),
        ("s3://b", {"endpoint": "http://h:65536"}, "remote_config_custom.endpoint"),
        ("s3://b", {"endpoint": "http://a host"}, "remote_config_custom.endpoint"),
        ("s3://b", {"endpoint": "https://h/b"}, "remote_config_custom.endpoint"),
        ("s3://b", {"endpoint": "https://h/x/b/"}, "remote_config_custom.endpoint"),
        ("s3://b", {"endpoint": "https://h#b"}, "remote_config_custom.endpoint"),
        ("s3://b", {"endpoint": 9000}, "remote_config_custom.endpoint"),
        ("s3://b", {"region": "SECRET 1"}, "remote_config_custom.region"),
        ("s3://b", {"bucket": 7}, "remote_config_custom.bucket"),
        ("s3://b", {"secret_key": "SECRET\n"}, "remote_config_custom.secret_access_key"),
        ("s3://b", {"aws_session_token": "SECRETé"}, "remote_config_custom.aws_session_token"),
        ("s3://a bucket", {}, "remote_cache_path"),
        ("s3://b/p//q", {}, "remote_cache_path"),
        ("s3://b/p/../q", {}, "remote_cache_path"),
        ("file:///mnt", {"region": "SECRET"}, "remote_config_custom.region"),
    ],
)
def test_wrong_addresses_are_refused_by_field(url: str, custom: dict[str, Any], field: str) -> None:
    """The error names the field, and shows nothing that may be secret."""
    with pytest.raises(ConfigError) as caught:
        parse_address(url, custom)
    assert caught.value.field == field
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "warns"),
    [("http://127.0.0.1:9000", False), ("http://localhost", False), ("http://[::1]:1", False),
     ("http://10.0.0.1:9000", True), ("http://minio:9000", True), ("https://minio", False)],
)  # fmt: skip
def test_what_others_can_read_is_warned_of(
    endpoint: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """http is allowed by itself, with a warning unless it stays on this machine."""
    with caplog.at_level(logging.WARNING):
        address = parse_address("s3://b", {"endpoint": endpoint})
    assert address.client_options.get("allow_http", False) == endpoint.startswith("http:")
    assert ("remote_not_encrypted" in caplog.text) == warns


def test_no_credentials_are_shown() -> None:
    """Neither the address nor the store shows an option in its repr."""
    custom = {"access_key_id": "SECRET1", "secret_access_key": "SECRET2", "endpoint": "https://h"}
    address = parse_address("s3://bucket", custom)
    store = open_store("s3://bucket", custom, RemoteOptions())
    for shown in (repr(address), str(address), repr(store), store.where, repr([address])):
        assert "SECRET" not in shown


@pytest.mark.parametrize(
    ("custom", "shown", "why"),
    [
        ({"no_such_option": "SECRET", "region": "here"}, ".no_such_option", "not have this option"),
        ({"timeout": "SECRET", "region": "here"}, ".timeout", "wrong value"),
        ({"allow_http": "SECRET"}, ".allow_http", "wrong value"),
        ({"region": "here", "aws_region": "SECRET"}, "=['aws_region', 'region']", "one option"),
        ({"timeout": "SECRET", "no_option": "SECRET"}, "=['no_option', 'timeout']", "lacks one"),
    ],
)
def test_an_option_that_is_refused_is_named(custom: dict[str, str], shown: str, why: str) -> None:
    """Of the options, a ConfigError names those that are wrong, and shows no value."""
    with pytest.raises(ConfigError, match=why) as caught:
        open_store("s3://bucket", custom, RemoteOptions())
    assert str(caught.value).startswith(f"remote_config_custom{shown}: ")
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("name", ["AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_REGION"])
def test_what_the_environment_has_is_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that cannot be sent is refused by name: obstore would panic in each request."""
    monkeypatch.setenv(name, "SECRET\n")
    with pytest.raises(ConfigError, match="line break") as caught:
        open_store("s3://bucket", {}, RemoteOptions())
    assert caught.value.field == name
    assert "SECRET" not in str(caught.value)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without obstore, object stores name the extra that brings it; a directory needs nothing."""
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    with pytest.raises(BackendUnavailableError, match=r"flexkv\[remote\]"):
        open_store("s3://bucket", {}, RemoteOptions())
    open_store("file:///mnt/kv", {}, RemoteOptions()).close()


# -- spans --------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(0, 20), st.integers(0, 20))
def test_a_transfer_is_divided_by_spans(span_blocks: int, first: int, blocks: int) -> None:
    """Every block is in one part, in order; each part names its span, record, block and parent."""
    count = 8 * span_blocks + 40
    keys = [bytes([number]) * 16 for number in range(count + 1)]
    places = np.arange(blocks)[::-1].copy()
    names = BlockNames(b"".join(keys), Positions(first, blocks))
    transfer = Transfer(1, 0, Route(Tier.REMOTE, Tier.HOST), places + 99, places, names=names)
    position = first
    for part in parts_of(transfer, span_blocks):
        span, record = divmod(position, span_blocks)
        assert (part.first_record, part.begin) == (record, position - first)
        assert part.span_key == keys[(span + 1) * span_blocks]
        assert part.is_whole == (part.blocks == span_blocks)
        assert record + part.blocks <= span_blocks
        for name, host_id, outer_id in zip(part.names, part.host_ids, part.outer_ids, strict=True):
            assert name == (keys[position + 1], keys[position])
            assert host_id == places[position - first]
            assert outer_id == host_id + 99
            position += 1
    assert position == first + blocks
