"""A forked child keeps no connection of a node, so that peers notice when the node ends."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from tests.cluster_rigs import ClusterNode, Network, keys_of, turns


def sockets_of_child() -> int:
    """Return how many sockets a forked child has."""
    if not (child := os.fork()):
        count = 0
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # one was that of the listing
                count += stat.S_ISSOCK(os.fstat(int(name)).st_mode)
        os._exit(count)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


async def test_a_child_has_no_socket_of_a_node() -> None:
    """Listening sockets, control links and data connections of an owner end in a child."""
    before = sockets_of_child()
    network = Network(is_tcp=True)
    reader, owner = ClusterNode(network, 1), ClusterNode(network, 2)
    for each in (reader, owner):
        await each.start()
    reader.meet(owner)
    keys = keys_of(1, 2)
    owner.owner.put(keys)
    await reader.peers.want(1, keys, 0, 2)
    data = await reader.peers.data_socket(1)
    while not owner.data:
        await turns(1)
    assert sockets_of_child() == before + 1  # `data`, which belongs to its caller
    assert (await reader.peers.want(1, keys, 0, 2)).count == 2
    data.close()
    for each in (reader, owner):
        await each.stop()
