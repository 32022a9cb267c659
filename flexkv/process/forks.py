"""Forked children: objects of the parent release their descriptors there, and refuse calls.

A child that is forked without `exec` has a copy of everything but the threads. Its descriptors
share the parent's open files: they keep locks alive, and writes to them reach the parent. So each
object with descriptors registers a method with `on_fork`, which runs in the child before anything
else does, and each object with threads, files or connections holds a `HomeProcess`, which makes
its calls fail in the child.
"""

from __future__ import annotations

import os
import select
import selectors
import sys
import threading
import weakref
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from flexkv.common.errors import ClosedError

_methods: list[weakref.WeakMethod[Callable[[], object]]] = []
_lock = threading.Lock()


class HomeProcess:
    """The process that made an object; a forked child is another process.

    Attributes:
        is_here: whether this is that process.
    """

    __slots__ = ("__weakref__", "_process", "_what", "is_here")

    def __init__(self, what: str) -> None:
        """Remember this process; `what` names the object in errors."""
        self._process, self._what, self.is_here = os.getpid(), what, True
        _homes.add(self)

    def check(self) -> None:
        """Check that this is the process that made the object.

        Raises:
            ClosedError: it is a forked child.
        """
        if not self.is_here:
            raise ClosedError(
                f"{self._what} belongs to process {self._process}, which forked this one, and works"
                " only there: create one here, or start this process with the spawn method"
            )


_homes: weakref.WeakSet[HomeProcess] = weakref.WeakSet()


def on_fork(method: Callable[[], object]) -> None:
    """Register a bound method to be called in each forked child, as long as its object lives.

    It may close and replace descriptors. It must use no loop, lock or thread: the threads that ran
    or held them do not exist in the child.
    """
    with _lock:
        _methods[:] = [each for each in _methods if each() is not None]
        _methods.append(weakref.WeakMethod(method))


def replace(fd: int) -> None:
    """Point a descriptor at /dev/null, so that code that still uses its number does no harm."""
    if fd >= 0:
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.dup2(nowhere, fd, inheritable=False)
        finally:
            os.close(nowhere)


def replace_all(fd: int) -> None:
    """Replace a descriptor and every copy of it, such as the one that a memory mapping keeps."""
    if fd < 0:
        return
    ours = os.fstat(fd)
    for other in _descriptors():
        with suppress(OSError):
            if os.path.samestat(os.fstat(other), ours):
                replace(other)


def close_socket(socket: Any) -> None:
    """Close this process's copy of a socket; the parent keeps the connection."""
    os.close(socket.detach())


def detach_loop(loop: AbstractEventLoop, is_ours: bool = False) -> None:
    """Keep a forked child's copy of a loop from changing the parent's loop.

    Both share one epoll: a descriptor that the copy unregisters is lost to the parent, too.

    Args:
        loop: an event loop of any kind; one without an epoll is left alone.
        is_ours: whether nobody in the child uses the loop; the copy is then marked as closed, so
            that it is dropped without a warning.
    """
    selector = getattr(loop, "_selector", None)
    if loop.is_closed() or not isinstance(selector, selectors.EpollSelector):
        return
    if not is_ours:
        with select.epoll() as fresh:
            os.dup2(fresh.fileno(), selector.fileno(), inheritable=False)
    else:
        replace(selector.fileno())
        for name in ("_ssock", "_csock"):
            if (own := getattr(loop, name, None)) is not None:
                close_socket(own)
        loop.__dict__["_closed"] = True


def is_exiting() -> bool:
    """Return whether the interpreter has begun to exit: `atexit`'s callbacks run, or have run."""
    return sys.is_finalizing() or not threading.main_thread().is_alive()


def _descriptors() -> Iterator[int]:
    with suppress(OSError):
        yield from map(int, os.listdir("/proc/self/fd"))


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held the old one
    for home in _homes:
        home.is_here = False
    for each in _methods:
        method = each()
        if method is not None:
            # The child must start even if the method of one object fails.
            with suppress(Exception):
                method()


os.register_at_fork(after_in_child=_in_child)
