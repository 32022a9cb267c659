"""What a listener logs of those that it refuses."""

from __future__ import annotations

import asyncio
import json

import pytest

from flexkv.cluster.handshake import prove_to_owner
from flexkv.cluster.listener import LOGGED_S
from flexkv.observe.logs import configure_logging
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import KEY, ClusterNode, Network


@pytest.mark.parametrize("knows_key", [False, True])
def test_who_is_refused_does_not_fill_the_log(
    knows_key: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Strangers have one line a second, and so have nodes whose blocks are not like ours, which try
    again for ever; it counts those that were refused without one."""

    async def main() -> None:
        node, loop = ClusterNode(Network(), 1), asyncio.get_running_loop()
        await node.start()
        for pause_s in (0.0, LOGGED_S):
            await asyncio.sleep(pause_s)
            for _ in range(3):
                mine = await node.network.dial(node.listener.address)
                if knows_key:
                    await prove_to_owner(mine, KEY)
                else:
                    await loop.sock_sendall(mine, bytes(12))
                    assert await loop.sock_recv(mine, 1) == b""
                mine.close()
            await asyncio.sleep(0.1)
        await node.stop()

    configure_logging("warning", as_json=True)
    run_virtual(main())
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["others_before"] for line in lines if line["event"] == "peer_refused"] == [0, 2]
