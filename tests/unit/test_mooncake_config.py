"""Configuration of Mooncake Store: its file, and the cache's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexkv.common.config import CacheConfig
from flexkv.common.errors import ConfigError
from flexkv.mover.store_config import StoreConfig, load_store_config

FILE: dict[str, Any] = {
    "local_hostname": "10.0.0.2",
    "metadata_server": "P2PHANDSHAKE",
    "master_server_address": "10.0.0.1:50051",
    "protocol": "RDMA",
    "device_name": "mlx5_0",
    "global_segment_size": "4GB",
    "local_buffer_size": 1 << 20,
}


def loaded(folder: Path, **changes: Any) -> StoreConfig:
    """Return what a file says, without the keys that are None."""
    path = folder / "mooncake.json"
    kept = {name: value for name, value in {**FILE, **changes}.items() if value is not None}
    path.write_text(json.dumps(kept))
    return load_store_config(str(path))


def test_a_file_of_mooncake_is_read(tmp_path: Path) -> None:
    """The keys are Mooncake's own; protocols are in lower case, sizes may have a unit."""
    config = loaded(tmp_path, enable_ssd_offload=True, ssd_offload_path="/nvme", tenant_id="t")
    assert config == StoreConfig(
        "10.0.0.2", "P2PHANDSHAKE", "10.0.0.1:50051", "rdma", "mlx5_0", 4 << 30, 1 << 20,
        "/nvme", "t",
    )  # fmt: skip
    assert config.where == "mooncake://10.0.0.1:50051"


def test_what_need_not_be_given_has_defaults(tmp_path: Path) -> None:
    """A file may have two addresses only; the engine adds no memory to the store then."""
    names = [name for name in FILE if name not in ("local_hostname", "master_server_address")]
    config = loaded(tmp_path, **dict.fromkeys(names))
    assert (config.metadata_server, config.protocol) == ("P2PHANDSHAKE", "tcp")
    assert (config.segment_bytes, config.ssd_offload_path) == (0, "")


def test_a_file_of_the_older_form_counts_in_gb(tmp_path: Path) -> None:
    """With `master_addr`, the size of the segment is in GB."""
    changes = {"master_server_address": None, "global_segment_size": 256}
    config = loaded(tmp_path, master_addr="h:1", master_metrics_port=9003, **changes)
    assert (config.master, config.segment_bytes) == ("h:1", 256 << 30)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("local_hostname", None),
        ("local_hostname", " "),
        ("master_server_address", None),
        ("master_server_address", "host"),
        ("master_server_address", "http://host:1"),
        ("master_server_address", "host:70000"),
        ("metadata_server", "redis://10.0.0.1:6379"),
        ("metadata_server", "nonsense"),
        ("protocol", 4),
        ("global_segment_size", "4 apples"),
        ("global_segment_size", -1),
        ("local_buffer_size", True),
        ("enable_ssd_offload", "yes"),
        ("master_adress", "h:1"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: object) -> None:
    """A field that is missing, wrong or unknown is refused by its name before anything starts.

    Mooncake would end its process for a metadata server of a kind that it was built without.
    """
    with pytest.raises(ConfigError, match=f"mooncake_store_config_path: {field}"):
        loaded(tmp_path, **{field: value})


def test_an_offload_needs_a_directory(tmp_path: Path) -> None:
    """An offload to SSD without a directory is refused."""
    with pytest.raises(ConfigError, match="ssd_offload_path"):
        loaded(tmp_path, enable_ssd_offload=True)


def test_no_error_quotes_a_password(tmp_path: Path) -> None:
    """A metadata server's address with credentials is refused, and not shown."""
    with pytest.raises(ConfigError, match="metadata_server") as refused:
        loaded(tmp_path, metadata_server="http://user:secret@host/metadata")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    """A file that is not there, or has no JSON object, is refused by the key that names it."""
    path = tmp_path / "mooncake.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"mooncake_store_config_path=.*mooncake\.json"):
        load_store_config(str(path))


def test_the_key_enables_the_remote_tier() -> None:
    """`use_mooncake_store_backend` alone enables the tier, and needs the path of the file only."""
    cache = CacheConfig(use_mooncake_store_backend=True, mooncake_store_config_path="m.json")
    assert cache.has_remote
    cache.require_built()
    assert not CacheConfig().has_remote
    with pytest.raises(ConfigError, match="mooncake_store_config_path"):
        CacheConfig(use_mooncake_store_backend=True, enable_remote=True)
    with pytest.raises(ConfigError, match="remote_cache_path"):
        CacheConfig(
            use_mooncake_store_backend=True,
            mooncake_store_config_path="m.json",
            remote_cache_path="s3://bucket/",
        )
