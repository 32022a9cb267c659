"""Tests of heads that draft: EAGLE, EAGLE-3 and MTP, trained in seconds so that vLLM accepts them.

A head looks at nothing but the KV of its own layer, so drafts fail if that is wrong; answers are
right either way. MTP runs with a MiMo, because DeepSeek's models have MLA: vLLM caches no prefixes
of it on a CPU without AMX.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from .conftest import planned, wait_gone
from .conversations import recited
from .draft_heads import DRAFTS, LAYERS, LLAMA, MIMO, TARGETS, make
from .fork import Forked
from .hybrids import check_sound
from .recitals import BLOCK_TOKENS, PASSES, SIZES, Told, recite

DRAFT_LAYER = f"layers.{LAYERS}."


class Reciting:
    """Engines that recite, with the models made once."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        making = Forked(folder / "make.log", make, str(folder))
        making.told()
        making.kill()

    def run(self, name: str, passes: tuple[str, ...], **plan: Any) -> Told:
        """Run a method of drafting, or a target without drafts, and wait for the server's end.

        The plan's `drafts` are added to vLLM's `speculative_config`.
        """
        drafts = plan.pop("drafts", {})
        engine: Told = {"num_gpu_blocks_override": 1024, "max_num_seqs": 8}
        if name in TARGETS:
            drafts = {"method": name, "num_speculative_tokens": DRAFTS[name], **drafts}
            if name != "mtp":
                drafts["model"] = str(self._folder / name)
            engine["speculative_config"] = drafts
        plan = {**asdict(SIZES), "engine": engine, **plan}
        at = self._folder / f"run{len(list(self._folder.iterdir()))}"
        at.mkdir()
        model = str(self._folder / TARGETS.get(name, name))
        process = Forked(at / "engine.log", recite, planned(model, at, plan), passes)
        self._stack.callback(process.kill)
        told: Told = process.told()
        process.kill()
        if "server" in told:
            wait_gone(told["server"]["pid"])
        return told


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reciting]:
    """Yield what runs engines that recite."""
    with ExitStack() as stack:
        yield Reciting(tmp_path_factory.mktemp("drafts"), stack)


@pytest.fixture(scope="module", params=TARGETS)
def told(request: pytest.FixtureRequest, reciting: Reciting) -> Told:
    """Return all passes with FlexKV, of which the last corrupts the drafts' layer."""
    return reciting.run(
        request.param, PASSES, connector="own", corrupt_loads=True, layers=DRAFT_LAYER
    )


def accepted(told: Told, batches: slice = slice(None)) -> float:
    """Return the share of drafts that were accepted in some batches of a pass."""
    share: float = sum(told["accepted"][batches]) / sum(told["drafted"][batches])
    return share


CONVERSATIONS, PARTING = slice(0, SIZES.turns), slice(SIZES.turns, None)


@pytest.mark.support(
    "feature", "drafts with a KV cache of their own: EAGLE, EAGLE-3, MTP", "served",
    "with its own connector; MTP with a MiMo, whose attention is plain",
)  # fmt: skip
def test_drafts_after_a_load_are_as_good_as_after_a_local_hit(told: Told) -> None:
    """As many drafts are accepted after external hits as after local ones, and no block leaks."""
    check_sound(told)
    assert [name for name in told["layers"] if DRAFT_LAYER in name]
    local, external = told["local"], told["external"]
    assert sum(local["external"]) == 0
    assert sum(external["external"]) == sum(map(sum, external["cached"]))
    assert accepted(local, CONVERSATIONS) > 0.3
    for batches in (CONVERSATIONS, PARTING):
        assert abs(accepted(external, batches) - accepted(local, batches)) < 0.01


def test_answers_do_not_depend_on_drafts(told: Told) -> None:
    """Each pass answers what the model says without drafts, whatever became of its KV."""
    for name in PASSES:
        for prompts, answers in zip(told[name]["prompts"], told[name]["answers"], strict=True):
            assert answers == [recited(prompt, SIZES.answer_tokens) for prompt in prompts]


def test_the_last_block_of_each_hit_is_dropped(told: Told) -> None:
    """Hits end one block before the last whole one, local and external alike.

    The head's KV at the end of a block depends on the next token. Drafts of a prompt that parts
    from another one there are as good as those of prompts that part from none.
    """
    for name in ("local", "external"):
        for prompts, hits in zip(told[name]["prompts"], told[name]["cached"], strict=True):
            blocks = [(len(prompt) - 1) // BLOCK_TOKENS - 1 for prompt in prompts]
            assert hits == [number * BLOCK_TOKENS for number in blocks]
        assert accepted(told[name], PARTING) > accepted(told[name], CONVERSATIONS) - 0.1


def test_corrupt_drafts_are_not_accepted(told: Told) -> None:
    """If what was loaded for the head's layer is corrupt, hardly any draft is accepted."""
    corrupt, local = (accepted(told[name], CONVERSATIONS) for name in ("corrupt", "local"))
    assert told["corrupt"]["cached"] == told["local"]["cached"]
    assert corrupt < local / 4


@pytest.mark.soak
@pytest.mark.parametrize("method", TARGETS)
def test_a_connector_that_finds_nothing_changes_nothing(reciting: Reciting, method: str) -> None:
    """A connector that keeps nothing does not change answers, local hits or drafts."""
    without, told = (
        reciting.run(method, ("cold", "local"), connector=name) for name in ("none", "nothing")
    )
    for name in ("cold", "local"):
        assert told[name] == without[name]
    assert told["leaked_blocks"] == 0


@pytest.mark.soak
@pytest.mark.parametrize("target", [LLAMA, MIMO])
def test_without_drafts_the_model_recites(reciting: Reciting, target: str) -> None:
    """Without drafts and a connector, answers repeat what each prompt asks for."""
    told = reciting.run(target, ("cold",))["cold"]
    for prompts, answers in zip(told["prompts"], told["answers"], strict=True):
        assert answers == [recited(prompt, SIZES.answer_tokens) for prompt in prompts]


@pytest.mark.soak
@pytest.mark.parametrize("method", TARGETS)
def test_without_the_drop_drafts_are_worse_where_prompts_part(
    reciting: Reciting, method: str
) -> None:
    """If vLLM is told to keep the last block, FlexKV keeps it as well, and drafts fail for it."""
    drafts = {"disable_eagle_block_drop": True}
    told = reciting.run(method, PASSES[:3], connector="own", drafts=drafts)
    for name in ("local", "external"):
        for prompts, hits in zip(told[name]["prompts"], told[name]["cached"], strict=True):
            assert hits == [(len(p) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for p in prompts]
    local, external = (accepted(told[name], PARTING) for name in ("local", "external"))
    assert abs(external - local) < 0.01
    assert external < accepted(told["external"], CONVERSATIONS) - 0.1
