"""Gets and puts of the remote tier on an S3 server, against obstore's two modes and boto3.

The server is moto, or with `S3_SERVER=rgw` Ceph's gateway (`make test-s3` installs it). All have 16
requests in flight: the port and obstore's async calls on one loop, obstore's other calls and boto3
in threads. The port checks what it reads, and copies it to host memory; the others drop it. boto3
is in the environment of moto, in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import obstore

from benchmarks.harness import Figures, Options, alternate, median_ratio
from benchmarks.remote import SPAN_BYTES, PortRig
from flexkv.io.remote.object_store import ObjectStore
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from tests.moto import PROGRAM
from tests.s3 import KIND, running

AT_ONCE = 16
OPTIONS = RemoteOptions(deadline_s=120.0, gets_max=AT_ONCE, puts_max=AT_ONCE)
BOTO3 = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import boto3
from botocore.config import Config

custom, bucket, names, nbytes, threads = json.loads(sys.stdin.readline())
config = Config(
    max_pool_connections=threads, request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    s3={"addressing_style": "path", "payload_signing_enabled": False},
)
client = boto3.client(
    "s3", endpoint_url=custom["endpoint"], region_name=custom["region"],
    aws_access_key_id=custom["access_key_id"], config=config,
    aws_secret_access_key=custom["secret_access_key"],
)
body = bytes(nbytes)

def get(name):
    assert len(client.get_object(Bucket=bucket, Key="kv/" + name)["Body"].read()) == nbytes

def put(name):
    client.put_object(Bucket=bucket, Key="kv/boto3/" + name, Body=body)

with ThreadPoolExecutor(threads) as pool:
    for line in sys.stdin:
        begin = time.perf_counter()
        list(pool.map({"get": get, "put": put}[line.strip()], names))
        print(time.perf_counter() - begin, flush=True)
"""


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    spans = 2 if options.quick else 16
    with running() as server:
        bucket = server.new_bucket()
        store = cast("ObjectStore", open_store(f"s3://{bucket}/kv", server.custom, OPTIONS))
        with PortRig(store, spans, OPTIONS) as rig:
            names = rig.put_all()
            plain = _Plain(store, rig, names)
            with _boto3([server.custom, bucket, names, SPAN_BYTES, AT_ONCE]) as boto3:
                gets = alternate(
                    {
                        "port": rig.get_all,
                        "obstore async": plain.get_async,
                        "obstore sync": plain.get_sync,
                        "boto3": lambda: boto3("get"),
                    },
                    options.repeats,
                )
                puts = alternate(
                    {
                        "port": plain.afresh(names, rig.put_again),
                        "obstore async": plain.afresh(plain.own("async"), plain.put_async),
                        "obstore sync": plain.afresh(plain.own("sync"), plain.put_sync),
                        "boto3": plain.afresh(plain.own("boto3"), lambda: boto3("put")),
                    },
                    options.repeats,
                )
        mib = rig.nbytes / 2**20
    figures: Figures = {"server": KIND}
    for what, took in (("get", gets), ("put", puts)):
        modes = [took["obstore async"], took["obstore sync"]]
        faster = min(modes, key=statistics.median)
        figures[f"{what}: port / the faster obstore"] = median_ratio(faster, took["port"])
        figures[f"{what}: port / boto3"] = median_ratio(took["boto3"], took["port"])
        for name, seconds in took.items():
            figures[f"{what}: {name}, MiB/s"] = mib / statistics.median(seconds)
    return figures


class _Plain:
    """obstore's calls, and nothing else."""

    def __init__(self, store: ObjectStore, rig: PortRig, names: list[str]) -> None:
        self._client, self._store, self._rig, self._names = store._client, store, rig, names
        self._body = bytes(SPAN_BYTES)
        self._threads = ThreadPoolExecutor(AT_ONCE)

    def own(self, mode: str) -> list[str]:
        """Return the names of the objects that a mode puts."""
        return [f"{mode}/{name}" for name in self._names]

    def afresh(self, names: list[str], put: Callable[[], float]) -> Callable[[], float]:
        """Return a put that first deletes the objects of the last round; only the put is timed."""

        def deleted_and_put() -> float:
            obstore.delete(self._client, names)
            return put()

        return deleted_and_put

    def get_async(self) -> float:
        """Return the seconds in which one loop gets every object."""
        return self._on_loop(self._names, self._get)

    def put_async(self) -> float:
        """Return the seconds in which one loop puts every object."""
        return self._on_loop(self.own("async"), self._put)

    async def _get(self, name: str) -> None:
        body = await self._store.get(name, 0, SPAN_BYTES)
        assert sum(map(len, body)) == SPAN_BYTES

    async def _put(self, name: str) -> None:
        await obstore.put_async(self._client, name, self._body, use_multipart=False, mode="create")

    def _on_loop(self, names: list[str], call: Callable[[str], Any]) -> float:
        async def all_of_them() -> None:
            left = list(names)

            async def some() -> None:
                while left:
                    await call(left.pop())

            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(some())

        begin = time.perf_counter()
        self._rig.runner.run(all_of_them())
        return time.perf_counter() - begin

    def get_sync(self) -> float:
        """Return the seconds in which threads get every object."""

        def get(name: str) -> None:
            body = obstore.get_range(self._client, name, start=0, end=SPAN_BYTES)
            assert len(memoryview(body)) == SPAN_BYTES

        return self._in_threads(self._names, get)

    def put_sync(self) -> float:
        """Return the seconds in which threads put every object."""

        def put(name: str) -> None:
            obstore.put(self._client, name, self._body, use_multipart=False, mode="create")

        return self._in_threads(self.own("sync"), put)

    def _in_threads(self, names: list[str], call: Callable[[str], None]) -> float:
        begin = time.perf_counter()
        for _ in self._threads.map(call, names):
            pass
        return time.perf_counter() - begin


@contextmanager
def _boto3(settings: list[Any]) -> Iterator[Callable[[str], float]]:
    """Yield a function that has boto3 get or put every object, and returns the seconds it took."""
    command = [str(PROGRAM / "bin/python"), "-c", BOTO3]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        commands, answers = process.stdin, process.stdout

        def told(line: str) -> None:
            commands.write(f"{line}\n")
            commands.flush()

        def took(what: str) -> float:
            told(what)
            return float(answers.readline())

        told(json.dumps(settings))
        yield took
        commands.close()
