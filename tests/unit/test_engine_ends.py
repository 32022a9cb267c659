"""How a mover with an engine ends: the reads that are under way are waited for, within a bound."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence

import pytest

from flexkv.mover import engine_serving
from flexkv.mover.engine_serving import EngineServing, serve_engine
from flexkv.mover.wire import PACKET_BYTES, TO_ENGINE, Done, Read, encode

PATIENCE_S = 20.0
Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """Yield both ends of the connection between an engine's process and its mover.

    Afterwards, no thread may be left.
    """
    monkeypatch.setattr(engine_serving, "IDLE_S", 0.01)
    before = set(threading.enumerate())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE_S)
    with ours, theirs:
        yield ours, theirs
        for thread in set(threading.enumerate()) - before:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


class Slow:
    """An engine whose reads end when the test says so.

    Attributes:
        begun: how many reads have begun.
        may_end: one for each read that may end.
    """

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Semaphore(0), threading.Semaphore(0)
        self.reads = self.ended = 0

    def read(self, endpoint: str, addresses: Sequence[int], at: int, block_bytes: int) -> int:
        """Read slowly."""
        self.reads += 1
        self.begun.release()
        assert self.may_end.acquire(timeout=PATIENCE_S)
        self.ended += 1
        return 0


def read(number: int, endpoint: str = "there") -> Read:
    """Return a request."""
    return Read(number, endpoint, [1], 0, 1)


def test_reads_under_way_end_and_no_more_begin(ends: Ends) -> None:
    """Answers of reads under way are still sent; reads that are queued behind them are dropped."""
    engine = Slow()
    serving = EngineServing(ends[1], engine)
    for number in range(3):
        serving.take(read(number))
    serving.take(read(3, "elsewhere"))
    for _ in range(2):
        assert engine.begun.acquire(timeout=PATIENCE_S)
    assert not serving.drain(0.0)
    engine.may_end.release(2)
    assert serving.drain(PATIENCE_S)
    assert (engine.reads, engine.ended) == (2, 2)
    told = [TO_ENGINE.decode(ends[0].recv(PACKET_BYTES)) for _ in range(2)]
    assert {each.number for each in told if isinstance(each, Done)} == {0, 3}
    serving.take(read(4))
    assert serving.drain(PATIENCE_S)
    assert engine.reads == 2


def test_a_process_that_cannot_answer_ends(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the end of a read cannot be told, though the engine's process lives, the mover ends."""
    engine, statuses = Slow(), list[int]()
    monkeypatch.setattr(engine_serving.os, "_exit", statuses.append)
    serving = EngineServing(ends[1], engine)
    serving.take(read(0))
    assert engine.begun.acquire(timeout=PATIENCE_S)
    ends[1].close()
    engine.may_end.release()
    assert serving.drain(PATIENCE_S)
    assert statuses == [1]


class ExitError(Exception):
    """Stands for the exit of the process."""


@pytest.mark.parametrize("has_unread", [False, True])
@pytest.mark.parametrize("hangs", [False, True])
def test_the_process_ends_after_the_reads_that_are_under_way(
    ends: Ends, hangs: bool, has_unread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mover ends without an error, though nobody takes answers or a read hangs."""
    engine, statuses = Slow(), list[int]()
    monkeypatch.setattr(engine_serving, "DRAIN_S", 0.01 if hangs else PATIENCE_S)

    def end(status: int) -> None:
        statuses.append(status)
        raise ExitError

    monkeypatch.setattr(engine_serving.os, "_exit", end)

    def serve() -> None:
        with pytest.raises(ExitError):
            serve_engine(ends[1], engine)

    thread = threading.Thread(target=serve)
    thread.start()
    ends[0].send(encode(read(0)))
    assert engine.begun.acquire(timeout=PATIENCE_S)
    if has_unread:
        ends[1].send(encode(Done(9, 0)))
    ends[0].close()
    if not hangs:
        assert statuses == []
        engine.may_end.release()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert statuses == [0]
    assert engine.ended == (not hangs)
    engine.may_end.release()
