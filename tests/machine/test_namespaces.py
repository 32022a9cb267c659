"""Networks of our own, their faults, and wires: what other tests of several machines rely on."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from flexkv.testing.namespaces import Host, Network, drop_from, reset_from
from flexkv.testing.wire import Quality, Wire
from tests.machine.bed import check_machine

pytestmark = pytest.mark.machine

PATIENCE_S = 20
BEGUN = """
from flexkv.testing.namespaces import Network
from flexkv.testing.wire import Quality, Wire
network = Network(2)
wire = Wire(tuple(network.hosts), Quality())
print(wire.pid, *(host.pid for host in network.hosts), flush=True)
input()
"""


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Return two hosts."""
    check_machine()
    with Network(2) as network:
        yield network.hosts


def connected(hosts: list[Host], address: str) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection from the first host to the second, at an address of it."""
    with hosts[1].inside(lambda: socket.create_server((address, 0))) as server:
        mine = hosts[0].connect(address, server.getsockname()[1])
        theirs, _ = server.accept()
    return mine, theirs


def retransmits(connection: socket.socket) -> int:
    """Return how often the kernel has sent again what was not acknowledged, in vain."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 3)[2]


def exactly(connection: socket.socket, nbytes: int) -> bytes:
    """Return so many bytes; a socket with a time limit may return fewer at once."""
    got = b""
    while len(got) < nbytes:
        some = connection.recv(nbytes - len(got))
        assert some, "the stream has ended"
        got += some
    return got


def test_nothing_arrives_once_so_much_has(hosts: list[Host]) -> None:
    """A fault by bytes lets what is before them through; nothing arrives until it is healed."""
    first, second = hosts
    mine, theirs = connected(hosts, second.address)
    with mine, theirs:
        second.suffers(drop_from(first.address, 10_000))
        mine.sendall(b"a" * 1000)
        theirs.settimeout(PATIENCE_S)
        assert exactly(theirs, 1000) == b"a" * 1000
        mine.sendall(b"b" * 50_000)
        until_s = time.monotonic() + PATIENCE_S
        while not retransmits(mine):
            assert time.monotonic() < until_s
        got = b""
        with suppress(BlockingIOError):
            got = theirs.recv(1 << 16, socket.MSG_DONTWAIT)
        assert len(got) < 10_000
        second.suffers()
        theirs.settimeout(PATIENCE_S)
        rest = exactly(theirs, 50_000 - len(got))
        assert got + rest == b"b" * 50_000


def test_connections_are_reset(hosts: list[Host]) -> None:
    """A reset reaches who sends."""
    first, second = hosts
    mine, theirs = connected(hosts, second.address)
    with mine, theirs:
        second.suffers(reset_from(first.address))
        mine.sendall(b"a")
        mine.settimeout(PATIENCE_S)
        with pytest.raises(ConnectionResetError):
            mine.recv(1)


def test_a_wire_delays_in_both_directions(hosts: list[Host]) -> None:
    """A question and its answer take twice the delay, at least."""
    with Wire((hosts[0], hosts[1]), Quality(delay_ms=20)) as wire:
        mine, theirs = connected(hosts, wire.addresses[1])
        with mine, theirs:
            begin_s = time.monotonic()
            mine.sendall(b"a")
            assert theirs.recv(1) == b"a"
            theirs.sendall(b"b")
            assert mine.recv(1) == b"b"
            assert time.monotonic() - begin_s >= 0.040


def test_nothing_is_left_of_a_killed_process() -> None:
    """When the process that made a network is killed, every process of that network ends."""
    check_machine()
    program = subprocess.Popen(
        [sys.executable, "-c", BEGUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdin is not None
    pids = [int(pid) for pid in program.stdout.readline().split()]
    assert len(pids) == 3
    descriptors = [os.pidfd_open(pid) for pid in pids]
    program.kill()
    program.wait()
    for descriptor in descriptors:
        assert select.select([descriptor], [], [], PATIENCE_S)[0], "it still runs"
        os.close(descriptor)
    program.stdin.close()
    program.stdout.close()
