"""Configuration of Mooncake's TransferEngine: its file, and what a mover is told by it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flexkv.common.errors import ConfigError
from flexkv.mover.engine_config import PORTS, EngineConfig, load_engine_config
from flexkv.mover.life import MoverSizes, _settings

FILE: dict[str, Any] = {
    "engine_ip": "10.0.0.2",
    "engine_port": 5555,
    "metadata_backend": "redis",
    "metadata_server": "redis://:a-password@10.0.0.1:6380",
    "protocol": "TCP",
    "device_name": "",
}


def loaded(folder: Path, **changes: Any) -> EngineConfig:
    """Return what a file says, without the keys that are None."""
    is_trusted = bool(changes.pop("is_trusted", False))
    path = folder / "mooncake.json"
    kept = {name: value for name, value in {**FILE, **changes}.items() if value is not None}
    path.write_text(json.dumps(kept))
    return load_engine_config(str(path), is_trusted)


def test_a_file_as_users_have_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its metadata server is accepted; the log says once, without its address, it is unused."""
    with caplog.at_level(logging.INFO):
        config = loaded(tmp_path)
    assert config == EngineConfig("10.0.0.2", 5555, "tcp", "")
    assert not config.is_writable
    assert caplog.text.count("mooncake_metadata_server_not_used") == 1
    assert "a-password" not in caplog.text


def test_an_address_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All other fields have defaults: TCP, any port."""
    names = dict.fromkeys(name for name in FILE if name != "engine_ip")
    with caplog.at_level(logging.INFO):
        assert loaded(tmp_path, **names) == EngineConfig("10.0.0.2", 0, "tcp", "")
    assert caplog.text == ""
    assert loaded(tmp_path, engine_ip="fd00::2").host == "[fd00::2]"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine_ip", None),
        ("engine_ip", "node-1"),
        ("engine_ip", 7),
        ("engine_ip", "0.0.0.0"),
        ("engine_ip", "224.0.0.1"),
        ("engine_port", "5555"),
        ("engine_port", True),
        ("engine_port", -1),
        ("engine_port", 65_536 - PORTS + 1),
        ("metadata_backend", "zookeeper"),
        ("metadata_backend", 1),
        ("metadata_server", 6380),
        ("protocol", "carrier pigeon"),
        ("device_name", 1),
        ("engine_prt", 5555),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, field: str, value: object) -> None:
    """The error names the field; keys that are not known are errors, too."""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, **{field: value})
    assert caught.value.field == f"mooncake_config_path: {field}"


def test_what_may_be_a_secret_is_not_shown(tmp_path: Path) -> None:
    """Values of unknown keys, and of a metadata server, are hidden."""
    for changes in ({"metadata_server": ["a-password"]}, {"redis_password": "a-password"}):
        with pytest.raises(ConfigError) as caught:
            loaded(tmp_path, **changes)
        assert "a-password" not in str(caught.value) + repr(caught.value.value)


def test_rdma_needs_a_trusted_network(tmp_path: Path) -> None:
    """RDMA lends memory for writing, which the configuration has to allow."""
    with pytest.raises(ConfigError, match=r"p2p_trusted_network: true.*could change cached blocks"):
        loaded(tmp_path, protocol="rdma")
    config = loaded(tmp_path, is_trusted=True, protocol="rdma", device_name="mlx5_0")
    assert (config.is_writable, config.device_name) == (True, "mlx5_0")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    """The error names the key, and why the file cannot be read."""
    path = tmp_path / "mooncake.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="JSON"):
        load_engine_config(str(path), False)
    with pytest.raises(ConfigError, match="No such file"):
        load_engine_config(str(tmp_path / "none"), False)


def test_mooncake_gives_up_silent_peers_in_time() -> None:
    """Its own time limits follow from the deadline; ports are those from `engine_port` on."""
    sizes = MoverSizes(4, 4096, 60.0, 3.7)
    told = _settings(EngineConfig("10.0.0.2", 5555, "tcp", ""), sizes)
    for name in ("TRANSFER_TIMEOUT", "TCP_STATUS_TIMEOUT_SEC", "TCP_PROGRESS_TIMEOUT_SEC"):
        assert told[f"MC_{name}"] == "3"
    assert (told["MC_MIN_RPC_PORT"], told["MC_MAX_RPC_PORT"]) == ("5555", "5570")
    anywhere = EngineConfig("10.0.0.2", 0, "tcp", "")
    assert "MC_MIN_RPC_PORT" not in _settings(anywhere, sizes)
    assert _settings(anywhere, sizes._replace(peer_s=0.1))["MC_TRANSFER_TIMEOUT"] == "1"
