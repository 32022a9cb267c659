"""The keys of a request's prompt, which are made as they are needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexkv.common.config import ModelConfig, Settings

pytest.importorskip("vllm")

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from flexkv.integration.vllm.prompt import Scopes
from flexkv.integration.vllm.request_state import RequestStates
from flexkv.server.client import Client

MODEL = ModelConfig(num_layers=1, num_kv_heads=1, head_size=8, dtype="float16")
PER_BLOCK = 16


@pytest.fixture
def states(tmp_path: Path) -> RequestStates:
    """Return the requests of a scheduler that knows none yet, and that has no server."""
    client = Client(Settings(server_recv_port=f"ipc://{tmp_path}/socket"), MODEL)
    return RequestStates(client, Scopes(), None, PER_BLOCK)


def request(name: str, tokens: int, images: int) -> Request:
    """Return a request with a prompt of this many tokens; some of the first ones are images."""
    features = [
        MultiModalFeatureSpec(None, "image", f"{n}", PlaceholderRange(4 + 8 * n, 8), f"{n}")
        for n in range(images)
    ]
    sampling = SamplingParams(max_tokens=100)
    return Request(name, list(range(tokens)), sampling, None, mm_features=features)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_prompt_that_has_grown_has_the_keys_of_the_whole(
    states: RequestStates, images: int
) -> None:
    """Keys that are made as a prompt grows are those that it has when it comes at once."""
    growing, at_once = request("a", PER_BLOCK + 8, images), request("b", 4 * PER_BLOCK, images)
    tracked, expected = states.track(growing), states.track(at_once)
    for blocks in range(1, 5):
        states.part(tracked, blocks)
        assert tracked.transfers.prompt.blocks == blocks
        known = len(growing.all_token_ids)
        growing.append_output_token_ids(list(range(known, known + PER_BLOCK)))
    states.part(expected, 4)
    assert tracked.transfers.prompt.keys == expected.transfers.prompt.keys
