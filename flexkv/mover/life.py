"""One life of a mover: its process, the window, and the requests that it has not answered.

    started ──Ready──▶ serves ──× it died, it hung, too many slots are spoiled──▶ ended
       └──Refused, silence──────────────────────────────────────────────────────▶

When a life ends, its requests fail. If no request of a kind (gets, puts, others) is answered for
too long while some wait, the mover hangs. Its process is killed then, since only the end of the
process proves that it writes to no slot any more.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import threading
from asyncio import Future
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from flexkv.common.decoding import decoded
from flexkv.common.errors import MalformedError, RemoteError
from flexkv.mover.codes import CLEAN
from flexkv.mover.engine_config import PORTS, EngineConfig
from flexkv.mover.store_config import StoreConfig
from flexkv.mover.window import Slot, Window
from flexkv.mover.wire import (
    PACKET_BYTES,
    TO_ENGINE,
    Begin,
    Done,
    Exist,
    Found,
    Get,
    Lent,
    Put,
    Read,
    Ready,
    Refused,
    Request,
    encode,
)
from flexkv.process import forks

READY_S = 120.0
"""How long a mover may take to connect; it waits for a master that is away."""
END_S, TERMINATE_S = 5.0, 1.0
"""How long a mover may take to leave by itself before it is terminated; and how long to end after
that, before it is killed."""
NAMES_AT_ONCE = 2
"""How many requests without a slot the mover has at once. It answers one after the other, so those
that are given up would keep others waiting; where they wait here, they are not sent."""
SPOILED_SHARE = 4
"""A life ends when one in so many of its slots is spoiled."""


class MoverSizes(NamedTuple):
    """What a mover's window has room for, and how patient its engine is.

    Attributes:
        slots: objects on their way at once.
        slot_bytes: the bytes of the largest object.
        answer_s: a mover hangs if requests of a kind have waited for so long without any answer.
        peer_s: when Mooncake gives up a silent peer; 0 for half of `answer_s`.
    """

    slots: int
    slot_bytes: int
    answer_s: float
    peer_s: float = 0.0


class _Unanswered(NamedTuple):
    """A request that is not answered yet."""

    request: Request
    reply: Future[Done | Found]
    slot: Slot | None


class MoverLife:
    """A mover that runs, or has run.

    Attributes:
        ended: done when it has ended, with the reason, unless the loop was closed before.
        why: the reason; None while it runs.
        ready: what it said when it was connected to the store, or its engine answered others.
    """

    def __init__(
        self, config: StoreConfig | EngineConfig, sizes: MoverSizes, lent: Lent | None = None
    ) -> None:
        """Start the process. All calls must come from the loop that runs now.

        Args:
            config: of what it runs.
            sizes: of the window.
            lent: memory that other nodes may read, by its descriptor here.

        Raises:
            OSError: it cannot be started.
        """
        self._loop = asyncio.get_running_loop()
        self.ended: Future[str] = self._loop.create_future()
        self.why: str | None = None
        self.ready: Ready | None = None
        self._where, self._sizes = config.where, sizes
        self._numbers = itertools.count()
        self._unanswered: dict[int, _Unanswered] = {}
        self._overdue: dict[str, asyncio.TimerHandle] = {}
        """By kind, for kinds with requests that are not answered."""
        self._waiting: deque[Future[Slot]] = deque()
        self._names: deque[tuple[Request, Future[Done | Found]]] = deque()
        """Requests without a slot that are not sent yet."""
        self._window = Window(sizes.slots, sizes.slot_bytes, self._slot_freed)
        try:
            lending = () if lent is None else (lent.fd,)
            settings = _settings(config, sizes)
            self._socket, self._process = _started((self._window.fd, *lending), settings)
        except OSError:
            self._window.close()
            raise
        forks.on_fork(self._let_go_in_child)
        self._loop.add_reader(self._socket, self._read)
        self._late = self._loop.call_later(READY_S, self.end, "it could not connect in time")
        self._socket.send(encode(Begin(config, self._window.nbytes, lent)))

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """Return whether it was connected to the store, or its engine answered others."""
        return self.ready is not None

    @property
    def requests(self) -> int:
        """Return how many requests the mover has not answered."""
        return len(self._unanswered)

    @property
    def spoiled(self) -> int:
        """Return how many slots are never used again."""
        return self._window.spoiled

    # -- slots and requests ---------------------------------------------------------------------

    def take(self) -> Future[Slot]:
        """Return the future of a free slot; cancelling it gives up the wait."""
        taken: Future[Slot] = self._loop.create_future()
        if self.why is not None:
            taken.set_exception(self.error("get"))
        else:
            self._waiting.append(taken)
            self._grant()
        return taken

    def _grant(self) -> None:
        """Give free slots to those who wait, in their order."""
        while self.is_ready and self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
                continue
            slot = self._window.take()
            if slot is None:
                return
            self._waiting.popleft().set_result(slot)

    def _slot_freed(self) -> None:
        """Note that a slot is free; the last user of its bytes may be in any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._grant)

    def ask(self, make: Callable[[int], Request], slot: Slot | None = None) -> Future[Done | Found]:
        """Send a request, and return the future of its answer.

        Args:
            make: returns the request with its number.
            slot: the slot that it uses. The answer to a request frees the slot, or spoils it; but
                that of a get which has succeeded, and for which somebody waits, stays in use.

        Cancelling the future ends the wait, not the request.
        """
        reply: Future[Done | Found] = self._loop.create_future()
        if self.why is not None:
            reply.set_exception(self.error("request"))
            return reply
        request = make(next(self._numbers))
        if slot is not None:
            self._send(request, reply, slot)
            return reply
        while self._names and self._names[0][1].done():
            self._names.popleft()
        self._names.append((request, reply))
        self._send_names()
        return reply

    def _send_names(self) -> None:
        """Send requests without a slot, as many as the mover may have."""
        while self.is_ready and self._names and self._names_unanswered < NAMES_AT_ONCE:
            request, reply = self._names.popleft()
            if not reply.done():
                self._send(request, reply, None)

    @property
    def _names_unanswered(self) -> int:
        return sum(each.slot is None for each in self._unanswered.values())

    def _send(self, request: Request, reply: Future[Done | Found], slot: Slot | None) -> None:
        try:
            self._socket.send(encode(request))
        except BlockingIOError:  # it has not read what was sent before
            if slot is not None:
                slot.free()
            why = "its mover takes no more requests now"
            reply.set_exception(RemoteError(self._where, "request", why, is_busy=True))
            return
        except OSError as error:
            self.end(f"it takes no requests: {error.strerror}")
            reply.set_exception(self.error("request"))
            return
        self._unanswered[request.number] = _Unanswered(request, reply, slot)
        if _kind_of(request) not in self._overdue:
            self._expect(_kind_of(request))

    def _expect(self, kind: str) -> None:
        """End the life unless a request of a kind is answered in time."""
        limit_s = self._sizes.answer_s
        why = f"it has not answered for {limit_s:g} s"
        self._overdue[kind] = self._loop.call_later(limit_s, self.end, why)

    # -- replies --------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            packet = self._socket.recv(PACKET_BYTES)
            if not packet:
                self.end("its process has ended")
                return
            reply = decoded(TO_ENGINE, packet)
        except BlockingIOError:
            return
        except (OSError, MalformedError) as error:
            self.end(f"its connection failed: {error}")
            return
        match reply:
            case Ready():
                self._is_connected(reply)
            case Refused(why):
                self.end(why)
            case _:
                self._answered(reply)

    def _is_connected(self, ready: Ready) -> None:
        self.ready = ready
        self._late.cancel()
        self._send_names()
        self._grant()

    def _answered(self, answer: Done | Found) -> None:
        asked = self._unanswered.get(answer.number)
        if asked is None:
            return
        if not _is_answer(asked.request, answer):
            self.end("its connection failed: an answer does not fit its request")
            return
        del self._unanswered[answer.number]
        kind = _kind_of(asked.request)
        self._overdue.pop(kind).cancel()
        if any(_kind_of(each.request) == kind for each in self._unanswered.values()):
            self._expect(kind)
        is_wanted = not asked.reply.done()
        if asked.slot is not None:
            assert isinstance(answer, Done)
            is_read = is_wanted and isinstance(asked.request, Get | Read)
            self._settle(asked.slot, answer.code, is_read)
        if is_wanted:
            asked.reply.set_result(answer)
        if self._window.spoiled * SPOILED_SHARE >= self._window.slots:
            self.end("it may still write to too many slots")
        self._send_names()

    def _settle(self, slot: Slot, code: int, is_read: bool) -> None:
        if code < 0 and code not in CLEAN:
            slot.spoil()
        elif code < 0 or not is_read:
            slot.free()

    # -- the end --------------------------------------------------------------------------------

    def error(self, what: str) -> RemoteError:
        """Return the error of a request that fails since the mover has ended."""
        return RemoteError(self._where, what, f"its mover is not there: {self.why}")

    def end(self, why: str) -> None:
        """Kill the process, so that it writes no more, and fail all requests. Idempotent."""
        if self.why is not None:
            return
        self.why = why
        with suppress(ProcessLookupError):
            self._process.kill()
        self._release()
        self._reap()

    def _reap(self) -> None:
        """Have a thread wait for the process that was killed.

        Nobody else waits for it: it writes to the window of this life, and to no other.
        """
        with suppress(RuntimeError):  # no thread can be started: `subprocess` reaps it later
            _in_thread(self._process.wait)

    async def leave(self) -> None:
        """Do what `close` does, without blocking the loop. Idempotent.

        Cancellation: the process still has its time.
        """
        left = asyncio.Event()

        def wait() -> None:
            self._wait()
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(left.set)

        if not self._tell_to_leave():
            return
        try:
            _in_thread(wait)
        except RuntimeError:  # no thread can be started
            self._process.kill()
        else:
            await left.wait()

    def close(self) -> None:
        """Let the process leave, after what it moves; kill it if it still connects.

        A process that connects hears nothing, since Mooncake holds its GIL meanwhile.
        """
        if self._tell_to_leave():
            self._wait()

    def _tell_to_leave(self) -> bool:
        """Release everything; return whether the process is to be waited for."""
        if not self.is_ready:
            self.end("it was closed")
        if self.why is not None:
            return False
        self.why = "it was closed"
        self._release()
        return True

    def _wait(self) -> None:
        """Wait for a process that leaves; terminate it if that takes too long, then kill it."""
        process = self._process
        for limit_s, then in ((END_S, process.terminate), (TERMINATE_S, process.kill)):
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                then()
            else:
                return
        self._reap()

    def _release(self) -> None:
        self._late.cancel()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
        self._socket.close()
        self._window.close()
        asked, self._unanswered = self._unanswered, {}
        for overdue in self._overdue.values():
            overdue.cancel()
        waiting: list[Future[Slot] | Future[Done | Found]] = [
            *self._waiting,
            *(each.reply for each in asked.values()),
            *(reply for _, reply in self._names),
        ]
        self._waiting.clear()
        self._names.clear()
        if not self._loop.is_closed():
            self.ended.set_result(self.why or "")
            for future in waiting:
                if not future.done():
                    future.set_exception(self.error("request"))

    def _let_go_in_child(self) -> None:
        if self.why is None:
            forks.close_socket(self._socket)


def _in_thread(work: Callable[[], object]) -> None:
    """Do some work in a thread.

    Raises:
        RuntimeError: none can be started.
    """
    threading.Thread(target=work, name="flexkv-mover-end", daemon=True).start()


def _kind_of(request: Request) -> str:
    """Return the kind of a request: the mover carries out those of a kind one after the other."""
    if isinstance(request, Read):
        return request.endpoint
    return {Get: "get", Put: "put"}.get(type(request), "name")


def _is_answer(request: Request, answer: Done | Found) -> bool:
    """Return whether an answer is one to a request: a get brings no more than its slot holds."""
    if isinstance(answer, Found):
        return isinstance(request, Exist)
    if isinstance(request, Get):
        return answer.code <= request.size
    return not isinstance(request, Exist)


def mover_command(*arguments: str) -> list[str]:
    """Return how a mover is started, so that it imports nothing from the working directory."""
    return [sys.executable, "-P", "-m", "flexkv.mover", *arguments]


def _started(
    fds: tuple[int, ...], settings: Mapping[str, str]
) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a mover, and return our end of the connection and the process.

    Args:
        fds: descriptors that it inherits, that of the window first.
        settings: environment variables, unless they are set already.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs:
            numbers = map(str, (theirs.fileno(), fds[0], os.getpid()))
            process = subprocess.Popen(
                mover_command(*numbers),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *fds),
                start_new_session=True,
                env={**settings, **os.environ},
            )
    except OSError:
        ours.close()
        raise
    ours.setblocking(False)
    return ours, process


def _settings(config: StoreConfig | EngineConfig, sizes: MoverSizes) -> dict[str, str]:
    """Return settings of Mooncake. It gives up a silent peer before its mover counts as hung."""
    peer_s = str(max(1, int(sizes.peer_s or sizes.answer_s / 2)))
    settings = {
        "MC_TCP_STATUS_TIMEOUT_SEC": peer_s,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": peer_s,
        "MC_TRANSFER_TIMEOUT": peer_s,
        "MC_LOG_LEVEL": "ERROR",
    }
    if isinstance(config, EngineConfig) and (first := config.engine_port):
        settings["MC_MIN_RPC_PORT"] = str(first)
        settings["MC_MAX_RPC_PORT"] = str(first + PORTS - 1)
    return settings
