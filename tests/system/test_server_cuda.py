"""Tests of the stream order at a server with an engine on a fake GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.request import Operation
from flexkv.testing.fake_cuda import FakeCuda, FakeTensor

from .forked import forked_server
from .serving import BLOCKS, Instance, eventually, settings_in

TARGETS = range(20, 20 + BLOCKS)


class CudaInstance(Instance):
    """An instance whose only rank's caches are on a fake GPU."""

    drivers: list[FakeCuda]

    def begin(self) -> None:
        """Lend the caches, and wait until requests can be served."""
        self.agents[0].start([FakeTensor(layer) for layer in self.caches[0]])
        self.wait_ready()

    def write_later(self, blocks: range, value: float) -> None:
        """Queue a late overwrite of blocks on the calling thread's stream."""
        driver = self.drivers[-1]
        if not driver.current:
            driver.current = driver.open_stream(urgent=False)

        def write() -> None:
            time.sleep(0.1)
            for layer in self.caches[0]:
                layer[:, list(blocks)] = value

        driver._streams[driver.current].work.put(write)

    def close(self) -> None:
        """Disconnect, and close the stream."""
        driver = self.drivers[-1]
        if driver.current:
            driver.close_stream(driver.current)
        super().close()


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaInstance]:
    """Yield an instance that is connected."""
    settings = settings_in(tmp_path, use_ce_transfer_h2d=True, use_ce_transfer_d2h=True)
    server = forked_server(settings)
    made = CudaInstance(settings)
    made.drivers = []

    def opened(_: int) -> FakeCuda:
        memory: list[Any] = [*made.caches[0]]
        made.drivers.append(FakeCuda(memory))
        return made.drivers[-1]

    monkeypatch.setattr("flexkv.tiers.backend.BoundDriver", opened)
    made.begin()
    yield made
    made.close()
    server.close()
    assert server.exit_status == 0


def test_a_put_reads_what_the_stream_of_the_rank_has_queued(instance: CudaInstance) -> None:
    """A put reads after the work that the rank's stream had queued when it reported to be ready."""
    ids = np.arange(BLOCKS)
    number = instance.client.start(Operation.PUT, instance.keys(1), 0, ids, when_ready=True)
    instance.write_later(range(BLOCKS), 1.5)
    instance.agents[0].ready([number])
    assert instance.end_of(number).moved == BLOCKS
    assert instance.request(Operation.GET, 1, TARGETS).moved == BLOCKS
    assert all((layer[:, list(TARGETS)] == 1.5).all() for layer in instance.caches[0])


def test_a_get_writes_after_what_the_stream_of_the_rank_has_queued(instance: CudaInstance) -> None:
    """A get writes after the queued work of its blocks' earlier request."""
    before = instance.content(range(BLOCKS))
    assert instance.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    ids = np.array(TARGETS)
    number = instance.client.start(Operation.GET, instance.keys(1), 0, ids, when_ready=True)
    instance.write_later(TARGETS, 9.0)
    instance.agents[0].ready([number], to_device=True)
    assert instance.end_of(number).moved == BLOCKS
    eventually(lambda: not instance.drivers[-1]._streams[instance.drivers[-1].current].work.qsize())
    np.testing.assert_array_equal(instance.content(TARGETS), before)
