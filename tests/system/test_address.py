"""Tests that a running server keeps its address, even if its socket is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation
from flexkv.server.operator import command

from .forked import forked_server
from .serving import BLOCKS, Instance, eventually, settings_in


@pytest.mark.parametrize("address", ["custom", "own"])
def test_a_socket_that_was_removed_is_there_again(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its socket is removed, a server listens there again; it loses no peer and no address."""
    settings, path = settings_in(tmp_path), tmp_path / "socket"
    if address == "own":
        tmp_path.chmod(0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        settings = settings.model_copy(update={"server_recv_port": "own"})
        path = tmp_path / "flexkv" / "server"
    server = forked_server(settings)
    first, second = Instance(settings), Instance(settings, number=1)
    try:
        first.begin()
        for _ in range(2):
            path.unlink()
            with pytest.raises(ConfigError, match=f"in use by another server.*{server.pid}"):
                forked_server(settings)
            eventually(path.exists)
        assert first.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
        second.begin()
        assert second.request(Operation.GET, 1, range(BLOCKS)).moved == BLOCKS
        assert command(settings.server_recv_port, "status")["pid"] == server.pid
        path.unlink()
        path.write_text("dear")
        assert first.request(Operation.GET, 1, range(BLOCKS)).moved == BLOCKS
    finally:
        first.close()
        second.close()
        server.close()
    assert server.exit_status == 0
    assert path.read_text() == "dear"
