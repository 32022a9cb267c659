"""What a listener logs of strangers."""

from __future__ import annotations

import asyncio
import json

import pytest

from flexkv.cluster.listener import STRANGERS_LOGGED_S
from flexkv.observe.logs import configure_logging
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import ClusterNode, Network


def test_strangers_do_not_fill_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    """Strangers have one line a second; it counts those that were refused without one."""

    async def main() -> None:
        node, loop = ClusterNode(Network(), 1), asyncio.get_running_loop()
        await node.start()
        for pause_s in (0.0, STRANGERS_LOGGED_S):
            await asyncio.sleep(pause_s)
            for _ in range(3):
                mine = await node.network.dial(node.listener.address)
                await loop.sock_sendall(mine, bytes(12))
                assert await loop.sock_recv(mine, 1) == b""
                mine.close()
        await node.stop()

    configure_logging("warning", as_json=True)
    run_virtual(main())
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["others_before"] for line in lines if line["event"] == "peer_refused"] == [0, 2]
