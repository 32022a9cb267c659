"""A Redis server in memory, with the few commands that a cluster's store uses, on the loop's clock.

`tests/contract/test_cluster_store.py` runs one suite over it and over a real server. It may be
down, slow, cut off from some of its clients, lose everything, or lose answers only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from flexkv.cluster.redis_store import Command
from flexkv.cluster.store import ClusterStoreError

TRIMMED_AT_ONCE = 100
"""An approximate limit lets a stream have about as many entries more."""

_Stream = list[tuple[tuple[int, int], list[bytes]]]


class FakeRedisServer:
    """A server.

    Attributes:
        is_down: whether nobody is answered.
        written: how many commands have changed something.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.is_down = False
        self.written = 0
        self._epoch_s = 0.0
        self._values: dict[str, Any] = {}
        self._ends_s: dict[str, float] = {}
        self._last: dict[str, tuple[int, int]] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._commands: dict[str, Callable[..., Any]] = {
            "SET": self._set,
            "GET": lambda key: self._value(_text(key)),
            "MGET": lambda *keys: [self._value(_text(key)) for key in keys],
            "DEL": self._delete,
            "PEXPIRE": self._expire,
            "PTTL": self._ttl_ms,
            "SADD": self._add,
            "SREM": self._remove,
            "SMEMBERS": lambda key: list(self._value(_text(key)) or ()),
            "ZADD": self._set_score,
            "ZINCRBY": self._increase_score,
            "ZMSCORE": self._scores,
            "XADD": self._append,
            "XREVRANGE": self._latest,
            "MEMORY": self._size,
        }

    def flush(self, is_clock_set_back: bool = False) -> None:
        """Lose everything, as FLUSHALL does, or a restart without a file."""
        if is_clock_set_back:
            self._epoch_s = asyncio.get_running_loop().time()
        self._values.clear()
        self._ends_s.clear()
        self._last.clear()

    def trim(self, entries: int) -> None:
        """Remove all but the last entries of each stream."""
        for value in self._values.values():
            if isinstance(value, list):
                del value[: max(0, len(value) - entries)]

    def keys(self) -> list[str]:
        """Return all keys."""
        return [key for key in list(self._values) if self._value(key) is not None]

    async def run(self, command: Command) -> Any:
        """Carry a command out, and return its answer."""
        name, *arguments = command
        if _text(name) == "XREAD":
            return await self._read(list(arguments))
        done = self._commands.get(_text(name))
        if done is None:
            raise ClusterStoreError("fake redis", _text(name), "ERR unknown command")
        return done(*arguments)

    # -- keys -----------------------------------------------------------------------------------

    def _value(self, key: str) -> Any:
        end_s = self._ends_s.get(key)
        if end_s is not None and asyncio.get_running_loop().time() >= end_s:
            self._values.pop(key, None)
            del self._ends_s[key]
        return self._values.get(key)

    def _set(self, key: Any, value: Any, *options: Any) -> bytes | None:
        key, words = _text(key), [_text(each) for each in options]
        before: bytes | None = self._value(key)
        if "NX" in words and before is not None:
            return None
        self.written += 1
        self._values[key] = _bytes(value)
        self._ends_s.pop(key, None)
        if "PX" in words:
            ttl_s = int(words[words.index("PX") + 1]) / 1000
            self._ends_s[key] = asyncio.get_running_loop().time() + ttl_s
        return before if "GET" in words else b"OK"

    def _expire(self, key: Any, ttl_ms: Any) -> int:
        if self._value(_text(key)) is None:
            return 0
        self._ends_s[_text(key)] = asyncio.get_running_loop().time() + int(ttl_ms) / 1000
        return 1

    def _ttl_ms(self, key: Any) -> int:
        if self._value(_text(key)) is None:
            return -2
        end_s = self._ends_s.get(_text(key))
        return -1 if end_s is None else round((end_s - asyncio.get_running_loop().time()) * 1000)

    def _delete(self, *keys: Any) -> int:
        found = [key for key in map(_text, keys) if self._value(key) is not None]
        for key in found:
            del self._values[key]
            self.written += 1
        return len(found)

    def _add(self, key: Any, *members: Any) -> int:
        wanted, have = {_bytes(each) for each in members}, self._value(_text(key)) or set()
        self._values[_text(key)] = have | wanted
        self.written += bool(wanted - have)
        return len(wanted - have)

    def _remove(self, key: Any, *members: Any) -> int:
        unwanted, have = {_bytes(each) for each in members}, self._value(_text(key)) or set()
        self.written += bool(unwanted & have)
        if have - unwanted:
            self._values[_text(key)] = have - unwanted
        else:
            self._values.pop(_text(key), None)
        return len(unwanted & have)

    def _scores(self, key: Any, *names: Any) -> list[bytes | None]:
        scores = self._value(_text(key)) or {}
        return [_score(scores.get(_bytes(name))) for name in names]

    def _set_score(self, key: Any, *words: Any) -> int:
        *options, score, name = words
        assert options in ([], ["GT"], ["NX"]), "only what the store uses"
        scores = self._values.setdefault(_text(key), {})
        before = scores.get(_bytes(name))
        may_change = {"GT": before is None or before < float(score), "NX": before is None}
        if before != float(score) and all(may_change[option] for option in options):
            self.written += 1
            scores[_bytes(name)] = float(score)
        return int(before is None)

    def _increase_score(self, key: Any, by: Any, name: Any) -> bytes | None:
        scores = self._values.setdefault(_text(key), {})
        scores[_bytes(name)] = scores.get(_bytes(name), 0.0) + float(by)
        self.written += 1
        return _score(scores[_bytes(name)])

    # -- streams --------------------------------------------------------------------------------

    def _append(self, key: Any, *rest: Any) -> bytes:
        maxlen, approximately, entries_max, new_id, field, value = rest
        assert (_text(maxlen), _text(approximately), _text(new_id)) == ("MAXLEN", "~", "*")
        key, self.written = _text(key), self.written + 1
        stream: _Stream = self._value(key) or self._values.setdefault(key, [])
        now_s = asyncio.get_running_loop().time() - self._epoch_s
        now = (round(now_s * 1000) + 1, 0)
        last = self._last.get(key, (0, 0))
        self._last[key] = now if now > last else (last[0], last[1] + 1)
        stream.append((self._last[key], [_bytes(field), _bytes(value)]))
        if len(stream) > int(entries_max) + TRIMMED_AT_ONCE:
            del stream[: len(stream) - int(entries_max)]
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        return _id(self._last[key])

    def _latest(self, key: Any, *_: Any) -> list[list[Any]]:
        stream: _Stream = self._value(_text(key)) or []
        return [[_id(number), fields] for number, fields in stream[-1:]]

    def _size(self, _: Any, key: Any) -> int | None:
        stream: _Stream | None = self._value(_text(key))
        if stream is None:
            return None
        return 64 + sum(24 + len(fields[1]) for _, fields in stream)

    async def _read(self, words: list[Any]) -> list[list[Any]] | None:
        names = [_text(word).upper() for word in words]
        count = int(words[names.index("COUNT") + 1])
        wait_s = int(words[names.index("BLOCK") + 1]) / 1000 if "BLOCK" in names else 0.0
        streams = words[names.index("STREAMS") + 1 :]
        half = len(streams) // 2
        until_s = asyncio.get_running_loop().time() + wait_s
        while True:
            found = []
            for key, behind in zip(streams[:half], streams[half:], strict=True):
                after = _numbers(_bytes(behind))
                stream: _Stream = self._value(_text(key)) or []
                begin = len(stream)
                while begin and stream[begin - 1][0] > after:
                    begin -= 1
                if rows := [[_id(n), fields] for n, fields in stream[begin : begin + count]]:
                    found.append([_bytes(key), rows])
            left_s = until_s - asyncio.get_running_loop().time()
            if found or left_s <= 0:
                return found or None
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await asyncio.wait([waiter], timeout=left_s)


class FakeRedis:
    """A client of a server; it is one node's.

    Attributes:
        is_cut_off: whether nothing reaches the server.
        loses_answers: whether commands are carried out, and their answers are lost.
        delay_s: how long a request and its answer take.
        answer_s: how long an answer is waited for.
    """

    def __init__(
        self,
        server: FakeRedisServer,
        delay_s: Callable[[], float] = lambda: 0.0,
        answer_s: float = 2.0,
    ) -> None:
        self.where = "fake redis"
        self.is_cut_off = self.loses_answers = False
        self.delay_s, self.answer_s = delay_s, answer_s
        self._server = server

    async def run(self, commands: Sequence[Command], wait_s: float = 0.0) -> list[Any]:
        """Send commands and return their answers: see `Commands.run`."""
        what = str(commands[0][0])
        try:
            async with asyncio.timeout(self.answer_s + wait_s):
                await asyncio.sleep(self.delay_s())
                if self._server.is_down:
                    raise ClusterStoreError(self.where, what, "connection refused")
                if self.is_cut_off:
                    await self._no_answer(wait_s)
                answers = [await self._server.run(command) for command in commands]
                if self.loses_answers or self.is_cut_off:
                    await self._no_answer(wait_s)
                await asyncio.sleep(self.delay_s())
        except TimeoutError as error:
            raise ClusterStoreError(self.where, what, "no answer in time") from error
        return answers

    async def _no_answer(self, wait_s: float) -> None:
        """Wait for longer than anybody does."""
        await asyncio.sleep(2 * (self.answer_s + wait_s))

    async def close(self) -> None:
        """Do nothing."""


def _text(word: Any) -> str:
    return word.decode() if isinstance(word, bytes) else str(word)


def _bytes(word: Any) -> bytes:
    return word if isinstance(word, bytes) else str(word).encode()


def _score(score: float | None) -> bytes | None:
    return None if score is None else f"{score:.17g}".encode()


def _id(number: tuple[int, int]) -> bytes:
    return b"%d-%d" % number


def _numbers(entry_id: bytes) -> tuple[int, int]:
    time_ms, _, number = entry_id.partition(b"-")
    return int(time_ms), int(number or 0)
