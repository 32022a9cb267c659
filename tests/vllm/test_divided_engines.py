"""Tests that engines whose attention backend divides vLLM's blocks answer the same with FlexKV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from . import test_outputs
from .hybrids import Hybrids, check_sound


@pytest.mark.support(
    "feature",
    "attention backends that divide blocks into kernel blocks (FlashInfer)",
    "served",
    "on the CPU, whose backend the test makes divide them",
)
@pytest.mark.parametrize("connector", ["shim", "own"])
def test_answers_of_a_plain_model_are_equal(
    run: test_outputs.Run, expected: dict[str, Any], connector: str
) -> None:
    """Blocks of 64 tokens are two of 32, whether or not vLLM tells the connector about blocks."""
    told = run(
        connector=connector, engine={"block_size": 64}, cache={"num_cpu_blocks": 80},
        kernel_tokens=32, flush=True,
    )  # fmt: skip
    assert len(told["divided"]) > 1
    test_outputs.check_sound(told, expected)
    assert min(min(turn) for turn in told["cached"][1:]) > 0
    moved = test_outputs.moved(told)
    assert moved["host→device"] > 500
    assert moved["disk→host"] > 100


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "engine", "layers", "host_blocks"),
    [
        ("gemma3", {"block_size": 64, "num_gpu_blocks_override": 80}, 6, 64),
        ("gemma4", {}, 2, 64),
        ("nemotron_h", {"block_size": 96, "num_gpu_blocks_override": 48}, 2, 24),
        ("qwen3_next", {}, 1, 32),
    ],
)  # fmt: skip
def test_answers_are_equal_where_a_block_is_several_kernel_blocks(
    hybrids: Hybrids, tmp_path: Path, name: str, engine: dict[str, Any], layers: int,
    host_blocks: int,
) -> None:  # fmt: skip
    """Attention has kernel blocks of 32 tokens, states have none; later turns hit, SSD included."""
    cache = {"num_cpu_blocks": host_blocks, "num_ssd_blocks": 4096}
    plan = hybrids.small(name, **engine)
    told = hybrids.run(
        name, tmp_path, connector="own", cache=cache, flush=True, kernel_tokens=32, **plan
    )
    assert len(told["divided"]) == layers
    check_sound(told)
    assert hybrids.wrong(name, told) == 0
    assert sum(told["external"]) > 1000
    assert told["server"]["statistics"]["routes"]["disk→host"]["blocks"] > 20
