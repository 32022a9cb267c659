"""Tests of engines on a real GPU at a server in its own process. `make gpu` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.request import Operation
from flexkv.server.launch import LaunchedServer
from flexkv.server.operator import command
from tests.system.conftest import MODEL, bytes_of, kv_caches
from tests.system.serving import BLOCKS, Instance, settings_in

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


class CudaInstance(Instance):
    """An instance whose caches are on the GPU, and whose agents copy between it and the server."""

    @staticmethod
    def _cache_of(model: ModelConfig, seed: int) -> list[Any]:
        heads = model.num_kv_heads // model.parts
        return [torch.from_numpy(layer[:, :, :, :heads].copy()).cuda() for layer in kv_caches(seed)]

    def content(self, device: range) -> list[NDArray[np.uint16]]:
        """Return the bytes of device blocks, by rank."""
        torch.cuda.synchronize()
        return [
            bytes_of([layer.cpu().numpy() for layer in caches], device) for caches in self.caches
        ]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return settings with a small SSD tier."""
    return settings_in(tmp_path)


@pytest.fixture(params=[1, 2])
def instances(request: pytest.FixtureRequest, settings: Settings) -> Iterator[list[CudaInstance]]:
    """Yield two instances, of one or two ranks each, at one server."""
    model = MODEL.model_copy(update={"tp_size": request.param})
    server = LaunchedServer(model, settings)
    made = [CudaInstance(settings, model, number) for number in (0, 1)]
    for each in made:
        each.begin()
    yield made
    for each in made:
        each.close()
    server.close()


def test_what_one_engine_put_another_gets(
    instances: list[CudaInstance], settings: Settings
) -> None:
    """One instance gets what another put, from host memory and SSD; other blocks stay unchanged."""
    one, two = instances
    before, untouched = one.content(range(BLOCKS)), two.content(range(40))
    assert one.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    assert two.request(Operation.GET, 1, range(40, 40 + BLOCKS)).moved == BLOCKS
    np.testing.assert_array_equal(two.content(range(40, 40 + BLOCKS)), before)
    np.testing.assert_array_equal(two.content(range(40)), untouched)
    command(settings.server_recv_port, "flush")
    command(settings.server_recv_port, "clear", tier="host")
    assert two.request(Operation.GET, 1, range(20, 20 + BLOCKS)).moved == BLOCKS
    np.testing.assert_array_equal(two.content(range(20, 20 + BLOCKS)), before)


def test_copies_wait_for_what_the_gpu_has_queued(instances: list[CudaInstance]) -> None:
    """A put or get waits for the kernels that were queued when its rank reported to be ready."""
    one, two = instances
    ids = np.arange(BLOCKS)
    number = one.client.start(Operation.PUT, one.keys(1), 0, ids, when_ready=True)
    overwrite_late(one, range(BLOCKS), 1.5)
    for agent in one.agents:
        agent.ready([number])
    assert one.end_of(number).moved == BLOCKS

    targets = range(20, 20 + BLOCKS)
    number = two.client.start(Operation.GET, two.keys(1), 0, np.array(targets), when_ready=True)
    overwrite_late(two, targets, 9.0)
    for agent in two.agents:
        agent.ready([number], to_device=True)
    assert two.end_of(number).moved == BLOCKS
    torch.cuda.synchronize()
    for caches in two.caches:
        assert all(bool((layer[:, 20 : 20 + BLOCKS] == 1.5).all()) for layer in caches)


def overwrite_late(instance: CudaInstance, blocks: range, value: float) -> None:
    """Queue work that takes a tenth of a second and then overwrites blocks."""
    torch.cuda._sleep(200_000_000)
    for caches in instance.caches:
        for layer in caches:
            layer[:, blocks.start : blocks.stop] = value
