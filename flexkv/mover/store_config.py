"""The configuration file of Mooncake Store: `mooncake_store_config_path`.

The keys are Mooncake's own. A file with `master_addr` is of an older form, in which the size of
the segment is in GB; in the other form, sizes are in bytes or have a unit.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from flexkv.common.errors import ConfigError
from flexkv.mover.config_file import Hidden, read_config

KEY = "mooncake_store_config_path"
P2P = "P2PHANDSHAKE"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SEGMENT_BYTES = 0
_BUFFER_BYTES = 16 << 20
_METADATA = ("http://", "https://", "etcd://", "etcds://")
_TEXTS = ("local_hostname", "metadata_server", "master_server_address", "protocol", "device_name")
_OTHERS = {
    "global_segment_size", "local_buffer_size", "enable_ssd_offload", "ssd_offload_path",
    "tenant_id", "master_addr", "master_metrics_port", "enable_client_http_server",
    "client_http_port",
}  # fmt: skip


class StoreConfig(msgspec.Struct, frozen=True, tag="store"):
    """How to reach a Mooncake Store, and what this node adds to it.

    Attributes:
        local_hostname: the address at which other nodes reach this one.
        metadata_server: "P2PHANDSHAKE", or the URL of a metadata server.
        master: host and port of the master.
        protocol: "tcp", "rdma", …
        device_name: the RDMA device; empty to choose one.
        segment_bytes: memory that this node adds to the store, for as long as its mover lives.
        buffer_bytes: memory that Mooncake uses for itself.
        ssd_offload_path: the directory to which the segment's objects are evicted; empty: none.
        tenant_id: the tenant of the store to which the objects belong.
    """

    local_hostname: str
    metadata_server: str
    master: str
    protocol: str
    device_name: str
    segment_bytes: int
    buffer_bytes: int
    ssd_offload_path: str
    tenant_id: str

    @property
    def where(self) -> str:
        """Return the name of the store, for errors and logs."""
        return f"mooncake://{self.master}"


def load_store_config(path: str | None) -> StoreConfig:
    """Return what a configuration file says.

    Raises:
        ConfigError: it cannot be read, or a field is missing or wrong; the error names the field.
    """
    return _config(read_config(KEY, path, "Mooncake Store"))


def _config(found: dict[str, Any]) -> StoreConfig:
    if unknown := found.keys() - _OTHERS - set(_TEXTS):
        raise _wrong(min(unknown), found[min(unknown)], "is not a key of Mooncake Store")
    is_older = "master_addr" in found
    if is_older:
        found = {"master_server_address": found["master_addr"], **found}
    texts = {name: _text(found, name) for name in _TEXTS}
    _check_address(texts["master_server_address"])
    _check_metadata(texts["metadata_server"])
    unit = _UNITS["g"] if is_older else 1
    offload = found.get("enable_ssd_offload", False)
    if not isinstance(offload, bool):
        raise _wrong("enable_ssd_offload", offload, "must be true or false")
    ssd_path = found.get("ssd_offload_path") or ""
    if offload and (not isinstance(ssd_path, str) or not ssd_path):
        raise _wrong("ssd_offload_path", ssd_path, "must be a directory")
    return StoreConfig(
        texts["local_hostname"],
        texts["metadata_server"],
        texts["master_server_address"],
        texts["protocol"].lower(),
        texts["device_name"],
        _size(found, "global_segment_size", _SEGMENT_BYTES, unit),
        _size(found, "local_buffer_size", _BUFFER_BYTES, 1),
        ssd_path if offload else "",
        str(found.get("tenant_id") or "default"),
    )


def _text(found: dict[str, Any], name: str) -> str:
    defaults = {"metadata_server": P2P, "protocol": "tcp", "device_name": ""}
    value = found.get(name, defaults.get(name))
    if not isinstance(value, str) or (not value.strip() and name != "device_name"):
        raise _wrong(name, value, "must be set to a string")
    return value.strip()


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or "/" in host:
        raise _wrong("master_server_address", address, "must be a host and a port")


def _check_metadata(address: str) -> None:
    """Check the metadata server: Mooncake ends its process if it cannot use one of this kind."""
    if "@" in address:
        why = "must have no credentials"
        raise ConfigError(f"{KEY}: metadata_server", Hidden(), why)
    if address != P2P and not address.startswith(_METADATA):
        why = f"must be {P2P}, or begin with one of {', '.join(_METADATA)}"
        raise _wrong("metadata_server", address, why)


def _size(found: dict[str, Any], name: str, default: int, unit: int) -> int:
    """Return a size in bytes; a number without a unit is in `unit` bytes."""
    value = found.get(name, default)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value * unit if name in found else default
    matched = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if matched is None:
        raise _wrong(name, value, "must be a number of bytes, or a size such as 4GB")
    return int(float(matched[1]) * (_UNITS[matched[2].lower()] if matched[2] else unit))


def _wrong(name: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"{KEY}: {name}", value, why)
