"""Reads of the remote tier from a Mooncake Store against Mooncake's own `batch_get_into`.

A block has 2 MiB, a span 8 of them. The port's reads go through the mover, and end when blocks are
in the arena, checked, with their sums. Those of a plain client end in its registered memory,
unchecked: all objects in one call, or one object in each call. All read the same objects, which are
in the memory of another process; the transport is TCP.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import psutil

from benchmarks.harness import Figures, Options, alternate, median_ratio
from benchmarks.remote import SPAN_BLOCKS, SPAN_BYTES, PortRig
from flexkv.common.errors import BackendUnavailableError
from flexkv.io.remote.mooncake import MooncakeStore
from flexkv.io.remote.open import open_mooncake
from flexkv.io.remote.options import RemoteOptions
from flexkv.mover.installed import check_installed
from tests.mooncake import Mooncake, running

OPTIONS = RemoteOptions(deadline_s=120.0, gets_max=15, puts_max=3, hedged_share=0.0)
"""As many gets and puts at once as an engine makes by default with such spans."""


def measure(options: Options) -> Figures:
    """Return the figures of the case; without Mooncake, a line says what was not measured."""
    try:
        check_installed()
    except BackendUnavailableError as error:
        return {"port / batch_get_into": f"not measured: {error}"}
    spans = 2 if options.quick else 16
    segment_bytes = 2 * spans * SPAN_BYTES
    with running(segment_bytes) as server, ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = open_mooncake(server.file(folder), OPTIONS, SPAN_BYTES)
        with PortRig(store, spans, OPTIONS) as rig:
            names = [store.prefix + name for name in rig.put_all()]
            plain = stack.enter_context(closing(_Plain(server, names)))
            mover = psutil.Process(rig.runner.run(_pid(store)))
            cpu_s: dict[str, list[float]] = {"port": [], "mover": [], "batch_get_into": []}

            def through_port() -> float:
                before, own = _cpu_s(mover), time.process_time()
                took_s = rig.get_all()
                cpu_s["mover"].append(_cpu_s(mover) - before)
                cpu_s["port"].append(time.process_time() - own)
                return took_s

            def at_once() -> float:
                took_s, took_cpu_s = plain.get_all(spans)
                cpu_s["batch_get_into"].append(took_cpu_s)
                return took_s

            took = alternate(
                {
                    "port": through_port,
                    "batch_get_into": at_once,
                    "batch_get_into, one by one": lambda: plain.get_all(1)[0],
                },
                options.repeats,
            )
            counts = rig.requests.counts()
    gib, reads = rig.nbytes / 2**30, rig.blocks * (options.repeats + 1)
    return {
        "port / batch_get_into": median_ratio(took["batch_get_into"], took["port"]),
        "port / batch_get_into, one by one": median_ratio(
            took["batch_get_into, one by one"], took["port"]
        ),
        "requests a block x G": counts.requests["get"] * SPAN_BLOCKS / reads,
        **{f"{name}, MiB/s": rig.nbytes / 2**20 / statistics.median(s) for name, s in took.items()},
        **{f"{name}, CPU s/GiB": statistics.median(s) / gib for name, s in cpu_s.items()},
    }


async def _pid(store: MooncakeStore) -> int:
    return store.mover.life().pid


def _cpu_s(mover: psutil.Process) -> float:
    times = mover.cpu_times()
    return float(times.user + times.system)


class _Plain:
    """Mooncake's own client, in a process of its own."""

    def __init__(self, server: Mooncake, names: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.mooncake_peer", server.address]
        self._process = subprocess.Popen(
            [*command, str(SPAN_BYTES), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def get_all(self, at_once: int) -> tuple[float, float]:
        """Return the seconds that it takes to read every object, and those of CPU."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{at_once}\n")
        took_s, cpu_s = map(float, self._process.stdout.readline().split())
        return took_s, cpu_s

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
