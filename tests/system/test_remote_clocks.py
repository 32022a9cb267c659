"""Engines whose clocks are wrong share a store as others do: only the store's own clock counts.

A library that is loaded first gives a process another time of day, to Python and to the store's
client. The steady clock and the times of files stay as they are, as on a machine that is set wrong.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.s3 import S3Server

from .test_remote import SPAN, WHOLE, Node
from .test_remote_limits import TTL_S, age, files

ROOT = Path(__file__).parents[2]
SPANS = WHOLE // SPAN
OFF_S, FAR_OFF_S, SLACK_S, PATIENCE_S = 60, 1800, 60, 180.0
"""Servers that speak S3 refuse requests from a machine whose clock is off by 15 minutes."""
WALL_CLOCK = {
    "engine/engine.py": "tells the clears of one engine from those of its last life",
    "io/ssd/missed_clears.py": "the same, on its own drive",
    "integration/vllm/adapters.py": "compares it with the times of an adapter's files",
    "observe/recorder.py": "says when a trace began",
    "cli/remote.py": "shows ages if the store's time cannot be read",
}
"""The modules that read the time of day, and what for."""
LIBRARY = """
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *off_s;

__attribute__((constructor)) static void begin(void)
{
    off_s = mmap(NULL, sizeof *off_s, PROT_READ, MAP_SHARED, open(getenv("OFF_S"), O_RDONLY), 0);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
        now->tv_sec += *off_s;
    return result;
}

int gettimeofday(struct timeval *now, void *zone)
{
    int result = syscall(SYS_gettimeofday, now, zone);
    now->tv_sec += *off_s;
    return result;
}

time_t time(time_t *into)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into)
        *into = now.tv_sec;
    return now.tv_sec;
}
"""
ENGINE = """
import asyncio, json, sys, time
from tests.system.test_remote import Node, listed

async def main(keys):
    is_alone = keys.pop("is_alone")
    async with Node(keys) as node:
        await node.until(listed)
        if is_alone:
            await node.until(lambda store: store.collection.is_collector)
            rounds = node.store.listed_rounds
            await node.until(lambda store: store.listed_rounds > rounds + 1)
        store = node.store
        told = {"expired": store.collection.removed.expired, "spans": store.known_spans,
                "is_collector": store.collection.is_collector, "time_s": time.time()}
        print(json.dumps({**told, "loaded": [await node.get(seed) for seed in (1, 2)]}))

print("ready", flush=True)
keys = json.loads(sys.stdin.readline())
asyncio.run(main(keys))
"""


def reads_wall_clock(path: Path) -> bool:
    """Return whether a module asks for the time of day."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns"):
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("now", "utcnow", "today"):
            return ast.unparse(node.value).startswith(("datetime", "date"))
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            return any(alias.name in ("time", "time_ns") for alias in node.names)
    return False


def test_what_is_shared_does_not_depend_on_the_time_of_day() -> None:
    """Few modules read it, for what concerns no other engine; none of the remote tier does."""
    package = ROOT / "flexkv"
    found = {str(path.relative_to(package)) for path in package.rglob("*.py")
             if reads_wall_clock(path)}  # fmt: skip
    assert found == set(WALL_CLOCK)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(LIBRARY)
    command = "cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", "clock.so", "clock.c"
    subprocess.run(command, cwd=folder, check=True)
    return folder / "clock.so"


class Clock:
    """By how much a process's time of day is off, which may change at any moment."""

    def __init__(self, library: Path, folder: Path, offsets_s: list[int]) -> None:
        self._offsets_s = cycle(offsets_s)
        self._off_s = np.memmap(folder / "off_s", np.int64, "w+", shape=1)
        self.environment = {"LD_PRELOAD": str(library), "OFF_S": str(folder / "off_s")}

    async def jump(self) -> None:
        """Set it to one offset after the other, until cancelled."""
        for offset_s in self._offsets_s:
            self._off_s[0] = offset_s
            await asyncio.sleep(0.02)


@asynccontextmanager
async def engine(clock: Clock) -> AsyncIterator[asyncio.subprocess.Process]:
    """Yield an engine that is about to start, and has that clock."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENGINE, cwd=ROOT, env={**os.environ, **clock.environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    jumping = asyncio.ensure_future(clock.jump())
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        jumping.cancel()
        with suppress(asyncio.CancelledError):
            await jumping
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def told_by(process: asyncio.subprocess.Process, keys: dict[str, Any]) -> dict[str, Any]:
    """Let an engine start with these keys, and return what it says in the end."""
    async with asyncio.timeout(PATIENCE_S):
        told, _ = await process.communicate(json.dumps(keys).encode() + b"\n")
    found: dict[str, Any] = json.loads(told)
    return found


CLOCKS = pytest.mark.parametrize(
    "signs", [[1], [-1], [1, -1]], ids=["ahead", "behind", "jumping"]
)


@CLOCKS
async def test_an_engine_whose_clock_is_off_deletes_what_is_old(
    tmp_path: Path, library: Path, signs: list[int]
) -> None:
    """By the store's time one span is just too old and another is not: only the first goes."""
    shared = tmp_path / "shared"
    keys = {
        "remote_cache_path": f"file://{shared}", "remote_list_per_s": 1000, "remote_ttl_s": TTL_S
    }  # fmt: skip
    async with Node(keys) as node:
        await node.put(1)
        old = files(shared)
        await node.put(2)
    young = [each for each in files(shared) if each not in old]
    async with engine(Clock(library, tmp_path, [FAR_OFF_S * sign for sign in signs])) as process:
        age(old, TTL_S + SLACK_S + 5)
        age(young, TTL_S + SLACK_S - FAR_OFF_S / 2)
        told = await told_by(process, {**keys, "is_alone": True})
    assert abs(told["time_s"] - time.time()) > FAR_OFF_S / 2
    assert (told["expired"], told["spans"], told["is_collector"]) == (SPANS, SPANS, True)
    assert told["loaded"] == [0, WHOLE]
    assert len(files(shared)) == SPANS


@CLOCKS
async def test_engines_whose_clocks_differ_share_a_bucket(
    tmp_path: Path, library: Path, s3: S3Server, signs: list[int]
) -> None:
    """One loads what the other has stored, one of the two collects, and nothing is too old."""
    keys = {
        "remote_cache_path": f"s3://{s3.new_bucket()}/kv", "remote_config_custom": s3.custom,
        "remote_list_per_s": 1000, "remote_ttl_s": TTL_S,
    }  # fmt: skip
    clock = Clock(library, tmp_path, [OFF_S * sign for sign in signs])
    async with Node(keys) as node, engine(clock) as other:
        await node.until(lambda store: store.collection.is_collector)
        await node.put(1)
        await node.put(2)
        told = await told_by(other, {**keys, "is_alone": False})
        assert abs(told["time_s"] - time.time()) > OFF_S / 2
        assert (told["expired"], told["spans"], told["is_collector"]) == (0, 2 * SPANS, False)
        assert told["loaded"] == [WHOLE, WHOLE]
        assert node.store.collection.is_collector
