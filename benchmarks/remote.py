"""Reads of the remote tier against plain obstore, sockets, and fio, over the same objects.

A block has 2 MiB, a span 8 of them. The port's reads are checked and in the arena with their sums;
obstore's end in memory of its own, unchecked, as one piece (`get_range`) or as chunks of 1 MiB
(`stream`, which the port uses); `recv_into` reads to one buffer for each connection.
All ask the same nginx for the same files. The directory is read cold, by the port and by fio.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import obstore

from benchmarks.harness import Figures, Options, alternate, median_ratio
from flexkv.common.terms import BlockNames, Positions, Route, Tier, Transfer
from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.names import Pool, PoolDescription
from flexkv.io.remote.open import join_pool, open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.port import RemotePort, SpanNews
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import SEAL_BYTES

BLOCK_BYTES, SPAN_BLOCKS = 2 << 20, 8
SPAN_BYTES = SPAN_BLOCKS * (BLOCK_BYTES + SEAL_BYTES)
BUCKET = "bucket"
OPTIONS = RemoteOptions(deadline_s=120.0, gets_max=4)
POOL = Pool(PoolDescription({"model": "benchmark"}, (BLOCK_BYTES,), SPAN_BLOCKS))
PATIENCE_S = 20.0
NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; sendfile on; sendfile_max_chunk 1m; tcp_nopush on; keepalive_requests 1000000;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def measure(options: Options) -> Figures:
    """Return the figures of the case; without nginx or fio, a line says what was not measured."""
    spans = 2 if options.quick else 16
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix=".flexkv-bench-", dir=_memory(options)) as folder:
        root = Path(folder).absolute()
        with PortRig(open_store(f"file://{root}/{BUCKET}", {}, OPTIONS), spans) as rig:
            names = rig.put_all()
        if shutil.which("nginx") is None:
            figures["against obstore and sockets"] = "not measured: nginx is not installed"
        else:
            figures |= _over_http(root, names, spans, options.repeats)
    with tempfile.TemporaryDirectory(prefix=".flexkv-bench-", dir=options.directory) as folder:
        figures |= _directory(Path(folder).absolute(), spans, options.repeats)
    return figures


def _memory(options: Options) -> Path:
    """Return a directory in memory, so that nginx reads no disk."""
    shared = Path("/dev/shm")
    return options.directory if options.quick or not shared.is_dir() else shared


class PortRig:
    """A port, its host memory, and a loop for it."""

    def __init__(self, store: OpenStore, spans: int, options: RemoteOptions = OPTIONS) -> None:
        self.blocks = spans * SPAN_BLOCKS
        self.nbytes = self.blocks * BLOCK_BYTES
        self.runner = asyncio.Runner()
        self.arena = Arena.open(self.blocks, BLOCK_BYTES)
        self.sums = np.zeros(self.blocks, np.uint64)
        self.requests = Requests(store, options)
        host = HostBlocks(self.arena, self.sums, (BLOCK_BYTES,))
        news = SpanNews(lambda _: None, lambda _: None)
        self.port = RemotePort(self.requests, POOL, host, options, news)
        self.port.spawn = self._spawn
        self._tasks: set[asyncio.Task[None]] = set()
        random = np.random.default_rng(5)
        self._keys = random.integers(0, 256, (1 + self.blocks, 16), np.uint8)
        self._woken = asyncio.Event()
        self.runner.run(self._connect())

    def __enter__(self) -> PortRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.port.close()
        self.arena.close()
        self.runner.close()

    async def _connect(self) -> None:
        self.port.connect(self._woken.set)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> object:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, transfers: list[Transfer]) -> None:
        for transfer in transfers:
            self.port.submit(transfer)
        left = len(transfers)
        while left:
            for end in self.port.reap():
                assert end.error is None, end.error
                left -= 1
            if left:
                await self._woken.wait()
                self._woken.clear()

    def fill(self) -> None:
        """Fill the host memory with bytes, and sum them."""
        random = np.random.default_rng(6)
        for block in self.arena.array:
            block[:] = np.frombuffer(random.bytes(BLOCK_BYTES), np.uint8)
        summer = PoolChecksummer(self.arena, sums=self.sums)
        summer.submit(0, np.arange(self.blocks), True)
        summer.close()

    def put_all(self) -> list[str]:
        """Fill the host memory, store every span of it, and return the objects' names."""
        self.fill()
        self.runner.run(join_pool(self.requests.store, POOL))
        self.put_again()
        return self.names

    @property
    def names(self) -> list[str]:
        """Return the objects' names."""
        size = SPAN_BLOCKS
        ends = range(size, self.blocks + 1, size)
        return [POOL.object_name(self._keys[end].tobytes()) for end in ends]

    def put_again(self) -> float:
        """Store every span of host memory, and return the seconds that it takes."""
        size, puts = SPAN_BLOCKS, []
        for first in range(0, self.blocks, size):
            keys = self._keys[first : first + size + 1].tobytes()
            places = np.arange(first, first + size)
            named = BlockNames(keys, Positions(0, size))
            route = Route(Tier.HOST, Tier.REMOTE)
            puts.append(Transfer(first, 0, route, places, places, names=named))
        begin = time.perf_counter()
        self.runner.run(self._run(puts))
        return time.perf_counter() - begin

    def get_all(self) -> float:
        """Read every span to host memory, and return the seconds that it takes."""
        places = np.arange(self.blocks)
        named = BlockNames(self._keys.tobytes(), Positions(0, self.blocks))
        route = Route(Tier.REMOTE, Tier.HOST)
        begin = time.perf_counter()
        self.runner.run(self._run([Transfer(1, 0, route, places, places, names=named)]))
        return time.perf_counter() - begin


# -- over HTTP ----------------------------------------------------------------------------------


@contextmanager
def _nginx(root: Path) -> Iterator[int]:
    """Serve a directory's files on a free port, and yield the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = root / "nginx.conf"
    configuration.write_text(NGINX.format(folder=root, root=root, port=port))
    os.chmod(root, 0o755)
    command = ["nginx", "-p", str(root), "-c", str(configuration)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as serving:
        try:
            until_s = time.monotonic() + PATIENCE_S
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert serving.poll() is None, "nginx has ended"
                    assert time.monotonic() < until_s, "nginx does not answer"
                    time.sleep(0.02)
            yield port
        finally:
            serving.terminate()


def _over_http(root: Path, names: list[str], spans: int, repeats: int) -> Figures:
    with _nginx(root) as port, ExitStack() as stack:
        custom = {"endpoint": f"http://127.0.0.1:{port}", "skip_signature": True}
        store = open_store(f"s3://{BUCKET}", custom, OPTIONS)
        rig = stack.enter_context(PortRig(store, spans))
        whole, stream = (_Plain(store, names, rig.runner, way) for way in ("whole", "stream"))
        sockets = {count: _Sockets(port, names, count) for count in (1, OPTIONS.gets_max)}
        for each in sockets.values():
            stack.callback(each.close)
        cpu_s: dict[str, list[float]] = {"port": [], "obstore, whole": [], "obstore, stream": []}
        took = alternate(
            {
                "port": _with_cpu(rig.get_all, cpu_s["port"]),
                "obstore, whole": _with_cpu(whole.get_all, cpu_s["obstore, whole"]),
                "obstore, stream": _with_cpu(stream.get_all, cpu_s["obstore, stream"]),
                "recv_into x 1": sockets[1].get_all,
                "recv_into x 4": sockets[OPTIONS.gets_max].get_all,
            },
            repeats,
        )
        counts = rig.requests.counts()
    gib = rig.nbytes / 2**30
    fetched_blocks = rig.blocks * (repeats + 1)
    return {
        "port / obstore, whole": median_ratio(took["obstore, whole"], took["port"]),
        "port / obstore, stream": median_ratio(took["obstore, stream"], took["port"]),
        "port / recv_into x 4": median_ratio(took["recv_into x 4"], took["port"]),
        "port / recv_into x 1": median_ratio(took["recv_into x 1"], took["port"]),
        "requests a block x G": counts.requests["get"] * SPAN_BLOCKS / fetched_blocks,
        **{f"{name}, MiB/s": rig.nbytes / 2**20 / statistics.median(s) for name, s in took.items()},
        **{f"{name}, CPU s/GiB": statistics.median(s) / gib for name, s in cpu_s.items()},
    }


def _with_cpu(work: Callable[[], float], cpu_s: list[float]) -> Callable[[], float]:
    """Return work that also records the CPU seconds of this process."""

    def measured() -> float:
        before = time.process_time()
        took_s = work()
        cpu_s.append(time.process_time() - before)
        return took_s

    return measured


class _Plain:
    """obstore's ranged gets, as many at once as the port makes, and nothing else."""

    def __init__(self, store: Any, names: list[str], runner: asyncio.Runner, way: str) -> None:
        self._client, self._names, self._runner = store._client, names, runner
        self._get = {"whole": self._whole, "stream": self._stream}[way]

    def get_all(self) -> float:
        """Return the seconds that it takes to read every object."""
        begin = time.perf_counter()
        self._runner.run(self._get_all())
        return time.perf_counter() - begin

    async def _get_all(self) -> None:
        left = list(self._names)

        async def some() -> None:
            while left:
                assert await self._get(left.pop()) == SPAN_BYTES

        async with asyncio.TaskGroup() as group:
            for _ in range(OPTIONS.gets_max):
                group.create_task(some())

    async def _whole(self, name: str) -> int:
        return len(await obstore.get_range_async(self._client, name, start=0, end=SPAN_BYTES))

    async def _stream(self, name: str) -> int:
        options: Any = {"range": (0, SPAN_BYTES)}
        found = await obstore.get_async(self._client, name, options=options)
        return sum([len(chunk) async for chunk in found.stream(1 << 20)])


class _Sockets:
    """Blocking sockets in threads, which read the same objects into one buffer each."""

    def __init__(self, port: int, names: list[str], count: int) -> None:
        self._names, self._count = names, count
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        self._buffers = [bytearray(SPAN_BYTES + 4096) for _ in range(count)]
        self._threads = ThreadPoolExecutor(count)

    def get_all(self) -> float:
        """Return the seconds that it takes to read every object."""
        begin = time.perf_counter()
        for _ in self._threads.map(self._get_some, range(self._count)):
            pass
        return time.perf_counter() - begin

    def _get_some(self, number: int) -> None:
        connection, buffer = self._sockets[number], memoryview(self._buffers[number])
        for name in self._names[number :: self._count]:
            path = f"/{BUCKET}/{name}"
            request = f"GET {path} HTTP/1.1\r\nHost: h\r\nRange: bytes=0-{SPAN_BYTES - 1}\r\n\r\n"
            connection.sendall(request.encode())
            read = connection.recv_into(buffer[:4096])
            while (head := bytes(buffer[:4096]).find(b"\r\n\r\n", 0, read)) < 0:
                read += connection.recv_into(buffer[read:4096])
            assert b" 206 " in bytes(buffer[:20])
            left = head + 4 + SPAN_BYTES - read
            while left:
                left -= connection.recv_into(buffer[:left])

    def close(self) -> None:
        """Close the connections, and end the threads."""
        self._threads.shutdown()
        for connection in self._sockets:
            connection.close()


# -- a directory --------------------------------------------------------------------------------


def _directory(root: Path, spans: int, repeats: int) -> Figures:
    if shutil.which("fio") is None:
        return {"directory / fio": "not measured: fio is not installed"}
    store = open_store(f"file://{root}/shared", {}, OPTIONS)
    with PortRig(store, spans) as rig:
        files = [root / "shared" / name for name in rig.put_all()]

        def cold(work: Callable[[], float]) -> Callable[[], float]:
            def measured() -> float:
                for file in files:
                    _forget(file)
                return work()

            return measured

        took = alternate(
            {"directory": cold(rig.get_all), "fio": cold(lambda: _fio(files))}, repeats
        )
        warm = alternate({"directory": rig.get_all}, repeats)["directory"]
    mib = rig.nbytes / 2**20
    return {
        "directory / fio": median_ratio(took["fio"], took["directory"]),
        **{f"{name} cold, MiB/s": mib / statistics.median(s) for name, s in took.items()},
        "directory cached, MiB/s": mib / statistics.median(warm),
    }


def _forget(file: Path) -> None:
    """Drop a file's pages from the page cache."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _fio(files: list[Path]) -> float:
    """Return the seconds in which fio reads the files, as many at once as the port does."""
    jobs = OPTIONS.gets_max
    command = [
        "fio", "--output-format=json", "--ioengine=psync", "--rw=read", "--bs=8m", "--thread",
        "--invalidate=0", "--group_reporting", "--file_service_type=sequential",
    ]  # fmt: skip
    for number in range(min(jobs, len(files))):
        mine = files[number::jobs]
        size = sum(file.stat().st_size for file in mine)
        names = ":".join(str(file).replace(":", "\\:") for file in mine)
        command += [f"--name=job{number}", f"--filename={names}", f"--size={size}", "--readonly"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    read = json.loads(told.stdout)["jobs"][0]["read"]
    assert read["io_bytes"] >= 0.9 * sum(file.stat().st_size for file in files), read["io_bytes"]
    return float(read["runtime"]) / 1e3
