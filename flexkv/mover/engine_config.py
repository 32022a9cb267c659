"""The configuration file of Mooncake's TransferEngine: `mooncake_config_path`.

Nodes tell each other where their engines answer, with each grant. So no metadata server is used,
whatever the file says: the engines shake hands with each other. (The published packages of Mooncake
end their process if they are told to use a Redis.)
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import msgspec

from flexkv.common.errors import ConfigError
from flexkv.mover.config_file import Hidden, read_config
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

KEY = "mooncake_config_path"
PORTS = 16
"""How many ports, from `engine_port` on, the engine chooses from; it needs two."""
_KEYS = "engine_ip", "engine_port", "metadata_backend", "metadata_server", "protocol", "device_name"
_PORT_MAX = 65_536 - PORTS


class EngineConfig(msgspec.Struct, frozen=True, tag="engine"):
    """How a node's TransferEngine is set up.

    Attributes:
        engine_ip: the address at which other nodes reach this one.
        engine_port: the first of the ports to choose from; 0 for any.
        protocol: "tcp" or "rdma".
        device_name: the RDMA device; empty to choose one.
    """

    engine_ip: str
    engine_port: int
    protocol: str
    device_name: str

    @property
    def where(self) -> str:
        """Return the name of the engine, for errors and logs."""
        return f"Mooncake on {self.engine_ip}"

    @property
    def is_writable(self) -> bool:
        """Return whether others may write to the memory that the engine lends."""
        return self.protocol != "tcp"

    @property
    def host(self) -> str:
        """Return the address as it stands before a port."""
        return f"[{self.engine_ip}]" if ":" in self.engine_ip else self.engine_ip


def load_engine_config(path: str | None, is_trusted: bool) -> EngineConfig:
    """Return what a configuration file says.

    Args:
        path: the file.
        is_trusted: whether everybody on the network may be trusted: `p2p_trusted_network`.

    Raises:
        ConfigError: it cannot be read, or a field is missing or wrong; the error names the field.
    """
    found = read_config(KEY, path, "Mooncake's TransferEngine")
    if unknown := found.keys() - set(_KEYS):
        why = f"is not a key of this file: {', '.join(_KEYS)}"
        raise _wrong(min(unknown), Hidden(), why)
    config = EngineConfig(
        _address(found.get("engine_ip")),
        _port(found.get("engine_port", 0)),
        _one_of(found, "protocol", ("tcp", "rdma"), "tcp"),
        _text(found, "device_name"),
    )
    if config.is_writable and not is_trusted:
        why = (
            "needs p2p_trusted_network: true. RDMA lends host memory for reading and writing, so "
            "anybody who reaches this network could change cached blocks of this node"
        )
        raise _wrong("protocol", config.protocol, why)
    backend = _one_of(found, "metadata_backend", ("redis", "p2phandshake"), "p2phandshake")
    if _text(found, "metadata_server") or backend == "redis":
        reason = "nodes tell each other where their engines are: no metadata server is needed"
        log.info("mooncake_metadata_server_not_used", backend=backend, reason=reason)
    return config


def _address(value: Any) -> str:
    try:
        address = ip_address(value) if isinstance(value, str) else None
    except ValueError:
        address = None
    if address is None or address.is_unspecified or address.is_multicast:
        why = "must be the IP address at which other nodes reach this one"
        raise _wrong("engine_ip", value, why)
    return str(address)


def _port(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _PORT_MAX:
        why = f"must be a port up to {_PORT_MAX}, or 0 for any: {PORTS} from it on are used"
        raise _wrong("engine_port", value, why)
    return value


def _text(found: dict[str, Any], name: str) -> str:
    value = found.get(name, "")
    if not isinstance(value, str):
        raise _wrong(name, Hidden(), "must be a string")
    return value.strip()


def _one_of(found: dict[str, Any], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = found.get(name, default)
    if not isinstance(value, str) or value.lower() not in allowed:
        raise _wrong(name, value, f"must be {' or '.join(allowed)}")
    return value.lower()


def _wrong(name: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"{KEY}: {name}", value, why)
