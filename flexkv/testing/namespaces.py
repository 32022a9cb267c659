"""Several machines on one: hosts with networks of their own, joined by a bridge, and their faults.

    host 10.77.0.1 ── veth ──╮
    host 10.77.0.2 ── veth ──┤ bridge, in a network of its own
    host 10.77.0.3 ── veth ──╯

Needs root, iproute2 and nftables. Nothing is attached to the machine's own network, and nothing has
a name outside: a host is a process that keeps a network namespace, and all its processes die with
the one that made them. So nothing is left behind, however a test ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
DIES_WITH_US = "setpriv", "--pdeathsig", "KILL"
PROGRAMS = "ip", "nft", "nsenter", "setpriv", "unshare"
_READY = "ip link set lo up && echo up && exec sleep infinity"


def missing() -> str:
    """Return what this machine lacks for networks of our own; empty if nothing."""
    if os.geteuid():
        return "needs root"
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"needs {', '.join(lacking)}" if lacking else ""


def run(*command: str, said: str = "") -> str:
    """Run a command that must succeed, and return what it prints."""
    done = subprocess.run(command, input=said, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


def enter(pid: int) -> None:
    """Move this thread, and what it starts from now on, into the network of a process."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(namespace)


class Namespace:
    """A network without any connection to others.

    Attributes:
        pid: of the process that keeps it; `enter(pid)` moves a thread there.
    """

    def __init__(self) -> None:
        self._keeper = subprocess.Popen(
            [*DIES_WITH_US, "unshare", "--net", "sh", "-c", _READY],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._keeper.stdout is not None
        self.pid = self._keeper.pid
        if self._keeper.stdout.readline() != b"up\n":
            self.close()
            raise OSError("no network of our own can be made")

    @property
    def command(self) -> list[str]:
        """Return the words that go before a command to run it here."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net"]

    def run(self, *command: str, said: str = "") -> str:
        """Run a command here, which must succeed, and return what it prints."""
        return run(*self.command, *command, said=said)

    def inside(self, work: Callable[[], T]) -> T:
        """Return what a function returns that runs here. The sockets that it makes stay here."""
        done: list[T] = []
        failed: list[BaseException] = []

        def there() -> None:
            try:
                enter(self.pid)
                done.append(work())
            except (OSError, AssertionError) as error:
                failed.append(error)

        thread = threading.Thread(target=there, name="inside a namespace")
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return done[0]

    def close(self) -> None:
        """Give the network up; it ends when no process is left in it."""
        self._keeper.kill()
        self._keeper.wait()
        assert self._keeper.stdout is not None
        self._keeper.stdout.close()


class Host(Namespace):
    """A machine of a network. Its faults concern what it receives.

    Attributes:
        address: its IP address.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address

    def connect(self, address: str, port: int, timeout_s: float = 10.0) -> socket.socket:
        """Return a connection from this host."""
        return self.inside(lambda: socket.create_connection((address, port), timeout_s))

    def suffers(self, *faults: str) -> None:
        """Replace the faults of this host: rules of nftables, in order; none heals it."""
        rules = "".join(f"    {fault}\n" for fault in faults)
        chain = f"  chain input {{\n    type filter hook input priority 0;\n{rules}  }}\n"
        self.run("nft", "-f", "-", said=f"table ip faults\ndelete table ip faults\n"
                 f"table ip faults {{\n{chain}}}\n")  # fmt: skip

    def link(self, is_up: bool) -> None:
        """Plug its cable in, or pull it."""
        self.run("ip", "link", "set", "eth0", "up" if is_up else "down")

    def slow_down(self, mbit_per_s: int) -> None:
        """Limit what it sends from now on."""
        limit = ["rate", f"{mbit_per_s}mbit", "burst", "128kb", "latency", "400ms"]
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit)

    @property
    def received_bytes(self) -> int:
        """Return how many bytes have arrived by the cable, since the start."""
        lines = Path(f"/proc/{self.pid}/net/dev").read_text().splitlines()
        line = next(each for each in lines if each.strip().startswith("eth0:"))
        return int(line.split(":")[1].split()[0])


def drop_from(source: str, after_bytes: int = 0) -> str:
    """Return the fault that nothing arrives from an address, after so many bytes that do."""
    return f"ip saddr {source} {_after(after_bytes)}drop"


def reset_from(source: str, after_bytes: int = 0) -> str:
    """Return the fault that connections from an address are refused, and reset with this packet."""
    return f"ip saddr {source} {_after(after_bytes)}meta l4proto tcp reject with tcp reset"


def refuse_new_from(source: str) -> str:
    """Return the fault that new connections from an address get no answer; old ones go on."""
    return f"ip saddr {source} tcp flags & (syn | ack) == syn drop"


def lose_from(source: str, percent: int) -> str:
    """Return the fault that some of the packets from an address are lost, at random."""
    return f"ip saddr {source} numgen random mod 100 < {percent} drop"


def _after(after_bytes: int) -> str:
    return f"quota over {after_bytes} bytes " if after_bytes else ""


class Network:
    """Hosts that are joined by a bridge; a context manager."""

    def __init__(self, hosts: int, prefix: str = "10.77.0") -> None:
        self._opened = ExitStack()
        self.hosts: list[Host] = []
        with ExitStack() as undo:
            bridge = Namespace()
            undo.callback(bridge.close)
            bridge.run("ip", "link", "add", "bridge0", "type", "bridge")
            bridge.run("ip", "link", "set", "bridge0", "up")
            for number in range(1, hosts + 1):
                host = Host(f"{prefix}.{number}")
                undo.callback(host.close)
                self.hosts.append(host)
                port = f"port{number}"
                bridge.run("ip", "link", "add", port, "type", "veth",
                           "peer", "name", "eth0", "netns", str(host.pid))  # fmt: skip
                bridge.run("ip", "link", "set", port, "master", "bridge0", "up")
                host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
                host.link(True)
            self._opened = undo.pop_all()

    def heal(self) -> None:
        """End all faults."""
        for host in self.hosts:
            host.suffers()
            host.link(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._opened.close()
