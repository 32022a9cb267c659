"""Strangers, who reach the port of a node that shares blocks, but do not know the secret.

`FUZZ_FRAMES=100000 FUZZ_SEED=7 pytest tests/machine/test_sharing_strangers.py` sends that many.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexkv.testing.stranger import Stranger
from tests.machine.bed import Bed, check_machine
from tests.machine.sharing_node import BLOCKS

pytestmark = pytest.mark.machine

FRAMES = int(os.environ.get("FUZZ_FRAMES", "5000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
WARM_FRAMES = 2000
"""After this many frames a node's memory grows only by leaks."""
GROWTH_BYTES_MAX = 48 << 20
LINKS_MORE = 4
"""How many connections the reader may have opened meanwhile."""
PORT = 7000


def test_strangers_get_nothing_and_leave_nothing(tmp_path: Path) -> None:
    """A stranger hears a version and a nonce, and changes nothing; others read blocks meanwhile.

    Afterwards the node has no more descriptors and tasks than before, and not much more memory.
    FUZZ_FRAMES and FUZZ_SEED choose the frames.
    """
    check_machine()
    with Bed(tmp_path, 2, p2p_port=PORT) as bed:
        owner, reader = bed.nodes
        owner.do("put", seed=1)
        reader.until("get", lambda got: got["blocks"] == BLOCKS, seed=1)
        before, digest = owner.is_free(), owner.do("digest")

        here, address = bed.redis_host, bed.hosts[0].address
        stranger = Stranger(lambda: socket.create_connection((address, PORT), 10), SEED)

        def fuzz(frames: int) -> None:
            """Send frames from another machine while the reader reads."""
            with ThreadPoolExecutor(1) as threads:
                talking = threads.submit(here.inside, lambda: stranger.run(frames))
                while not talking.done():
                    reader.do("clear")
                    got = reader.do("get", seed=1)
                    assert (got["blocks"], got["right"]) == (BLOCKS, True)
                talking.result()

        fuzz(min(FRAMES, WARM_FRAMES))
        warm_bytes = owner.do("facts")["memory_bytes"]
        fuzz(max(0, FRAMES - WARM_FRAMES))
        assert stranger.frames >= FRAMES
        grown_bytes = owner.do("facts")["memory_bytes"] - warm_bytes
        assert grown_bytes < GROWTH_BYTES_MAX
        stranger.close()
        assert owner.do("digest") == digest
        for each in "descriptors", "tasks":
            owner.until("facts", lambda now, each=each: now[each] <= before[each] + LINKS_MORE)
        assert owner.is_free()["ready"] == before["ready"]
        assert all(node.end() == 0 for node in bed.nodes)
