"""Run processes as other users, for tests that run as root.

    python -m tests.system.as_user CHANNEL

It imports everything first, because other users may not be able to read this Python. For each
message on the channel it forks a process, which becomes a user, prints "begun", does one thing, and
prints the result as a line of JSON. A message is [uid, action, arguments] in JSON, with the
process's standard streams; the answer is its process id.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flexkv.cli.serve import run
from flexkv.common.config import Settings, settings_of
from flexkv.common.errors import FlexKVError
from flexkv.common.request import Operation
from flexkv.index.keys import block_identity
from flexkv.observe.logs import configure_logging
from flexkv.server.address import own_folders, socket_path
from flexkv.server.listen import Listener, _witness_name
from flexkv.server.operator import command
from flexkv.server.wire import PROTOCOL_VERSION, Hello, framed
from tests.system.conftest import MODEL, PER_BLOCK
from tests.system.serving import BLOCKS, Instance

PR_SET_DUMPABLE, PTRACE_ATTACH, PIDFD_GETFD = 4, 16, 438
LIBC = ctypes.CDLL(None, use_errno=True)


def become(uid: int) -> None:
    """Change to a user, as if this user had started the process."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.umask(0)  # the most permissive mask
    os.environ.pop("XDG_RUNTIME_DIR", None)
    os.environ["HOME"] = "/nonexistent"
    # A change of the user makes a process undumpable: hidden from its own user until an exec.
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def begun() -> None:
    """Print that the work begins."""
    say("begun")


def say(line: str) -> None:
    """Print a line for the test."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def serve(settings: Settings) -> Any:
    """Run a server until SIGTERM; return "ended", or the error."""
    begun()
    try:
        asyncio.run(run(MODEL, settings))
    except FlexKVError as error:
        return str(error)
    return "ended"


def listen(path: str) -> Any:
    """Take an address as a server does, and keep it until stdin ends."""
    try:
        listener = Listener(socket_path(path))
    except FlexKVError as error:
        begun()
        return str(error)
    listener.listen()
    begun()
    sys.stdin.read()
    listener.close()
    return "listened"


def use(settings: Settings) -> Any:
    """Put and get over a server once the devices are ready; return the results."""
    begun()
    instance = Instance(settings)
    for agent, caches in zip(instance.agents, instance.caches, strict=True):
        agent.start(caches)
    try:
        instance.wait_ready()
        before = instance.content(range(BLOCKS))
        put = instance.request(Operation.PUT, 1, range(BLOCKS))
        got = instance.request(Operation.GET, 1, range(20, 20 + BLOCKS))
        same = np.array_equal(before, instance.content(range(20, 20 + BLOCKS)))
        command(settings.server_recv_port, "flush")
        return {"put": put.moved, "got": got.moved, "same": same}
    finally:
        instance.close()


def speak(settings: Settings) -> Any:
    """Try to use another user's server as client, agent and operator; return the results."""
    begun()
    instance = Instance(settings)
    for agent, caches in zip(instance.agents, instance.caches, strict=True):
        agent.start(caches)
    until_s, found = time.monotonic() + 1.0, 0
    while time.monotonic() < until_s:
        instance.client._reconnects._due_s = 0.0  # the test cannot wait that long
        found += instance.client.match(instance.keys(1)).blocks
        instance.client.poll()
        time.sleep(0.02)
    is_ready = instance.client.is_ready
    instance.close()
    try:
        operator = str(command(settings.server_recv_port, "status"))
    except FlexKVError as error:
        operator = str(error)
    return {"found": found, "ready": is_ready, "operator": operator}


def impersonate(path: str) -> Any:
    """Listen where a server would; return how many connected, and all bytes that they sent."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        if not path.startswith("\0"):
            os.chmod(path, 0o666)
        listening.listen()
        begun()
        threading.Thread(target=lambda: (sys.stdin.read(), listening.shutdown(2))).start()
        heard, count = b"", 0
        while True:
            try:
                peer, _ = listening.accept()
            except OSError:
                return {"connections": count, "heard": heard.hex()}
            count += 1
            with peer:
                peer.settimeout(0.2)
                with suppress(OSError):
                    heard += peer.recv(1 << 16)


def steal(told: dict[str, Any]) -> Any:
    """Try every attack of a stranger; return the names of those that succeeded."""
    begun()
    return [name for name, attempt in _attempts(told).items() if _succeeds(attempt)]


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        return attempt() is not False
    except OSError:
        return False


def _attempts(told: dict[str, Any]) -> dict[str, Callable[[], object]]:
    folder, pid = Path(told["folder"]), int(told["pid"])
    path, proc = folder / "server", Path(f"/proc/{pid}")
    attempts: dict[str, Callable[[], object]] = {
        "connect": lambda: _hello(str(path)),
        "connect to what is no file": lambda: _hello(told["witness"]),
        "list": lambda: os.listdir(folder),
        "unlink": path.unlink,
        "move": lambda: folder.rename(folder.with_name("stolen")),
        "remove": folder.rmdir,
        "replace": lambda: _bind(path),
        "bind beside": lambda: _bind(folder / "other"),
        "lock": lambda: fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB),
        "change the mode": lambda: folder.chmod(0o777),
        "signal": lambda: os.kill(pid, 0),
        "descriptors": lambda: os.listdir(proc / "fd"),
        "memory": lambda: (proc / "mem").open("rb"),
        "write memory": lambda: (proc / "mem").open("r+b"),
        "environment": lambda: (proc / "environ").read_bytes(),
        "maps": lambda: (proc / "maps").read_bytes(),
        "working directory": lambda: os.listdir(proc / "cwd"),
        "ptrace": lambda: LIBC.ptrace(PTRACE_ATTACH, pid, 0, 0) == 0,
        "read over processes": lambda: _process_vm_readv(pid),
        **{
            f"descriptor {fd}": lambda fd=fd: os.open(f"{proc}/fd/{fd}", os.O_RDWR)
            for fd in told["fds"]
        },
        **{f"take descriptor {fd}": lambda fd=fd: _pidfd_getfd(pid, fd) for fd in told["fds"]},
    }
    for file in map(Path, told["files"]):
        attempts |= {
            f"read {file}": lambda file=file: _open(file, os.O_RDONLY),
            f"write {file}": lambda file=file: _open(file, os.O_WRONLY),
            f"unlink {file}": lambda file=file: file.rmdir() if file.is_dir() else file.unlink(),
            f"link {file}": lambda file=file: os.link(file, told["shared"] + "/link"),
            f"lock {file}": lambda file=file: fcntl.flock(_open(file, os.O_RDONLY), fcntl.LOCK_EX),
            f"make beside {file}": lambda file=file: (
                file.parent / "superblock.flexkv.new"
            ).touch(),
        }
    return attempts


def _open(file: Path, flags: int) -> int:
    return os.open(file, flags)


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(path))


def _hello(address: str) -> bool:
    """Return whether a server sends anything in answer to a greeting."""
    hello = Hello(PROTOCOL_VERSION, "agent", os.getpid(), block_identity(MODEL, PER_BLOCK, ""))
    with socket.socket(socket.AF_UNIX) as ours:
        ours.settimeout(2.0)
        ours.connect(address)
        ours.sendall(framed(hello))
        return bool(ours.recv(1))


def _process_vm_readv(pid: int) -> bool:
    class Piece(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(8)
    ours = Piece(ctypes.cast(buffer, ctypes.c_void_p), 8)
    theirs = Piece(ctypes.cast(buffer, ctypes.c_void_p), 8)
    count: int = LIBC.process_vm_readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
    return ctypes.get_errno() not in (1, 3) if count < 0 else True  # 1 is EPERM, 3 is ESRCH


def _pidfd_getfd(pid: int, fd: int) -> bool:
    ours = os.pidfd_open(pid)
    return int(LIBC.syscall(PIDFD_GETFD, ours, fd, 0)) >= 0


def places() -> Any:
    """Return where this user's own server would be, and its name in the abstract namespace."""
    begun()
    folder = own_folders()[0]
    return {"folder": str(folder), "witness": _witness_name(folder / "server")}


ACTIONS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (serve, listen, use, speak, impersonate, steal, places)
}


def main() -> None:
    """Fork a process for each message, until the channel ends."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    while True:
        message, fds, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            channel.close()
            _be(json.loads(message), fds)
        for fd in fds:
            os.close(fd)
        channel.send(str(pid).encode())


def _be(message: tuple[int, str, list[Any]], fds: list[int]) -> NoReturn:
    """Run a message's action as its user, and exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    uid, action, arguments = message
    try:
        if action in ("serve", "use", "speak"):
            arguments = [settings_of(each) for each in arguments]
        configure_logging("info", as_json=True)
        become(uid)
        say(json.dumps(ACTIONS[action](*arguments)))
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
