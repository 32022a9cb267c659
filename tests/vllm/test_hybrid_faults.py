"""Tests of models with several KV groups under faults, one kind and one group at a time.

`make soak-vllm` runs them: each takes an engine of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from .hybrid_models import HYBRIDS
from .hybrids import SEVERAL, Hybrids, case, check_sound

pytestmark = pytest.mark.soak

support = pytest.mark.support
GROUPS = [(name, group) for name in SEVERAL for group in range(len(HYBRIDS[name].groups))]
SHOWING = [case(name, group) for name, group in GROUPS]
LONG_ANSWERS: dict[str, Any] = {
    "conversations": 4, "turns": 3, "first_tokens": 200, "turn_tokens": 40, "answer_tokens": 150,
}  # fmt: skip
SHORT_OF_BLOCKS = {"gemma3": 64, "gpt_oss": 50, "llama4": 72, "nemotron_h": 42}
"""Device blocks with which requests are preempted: in the first turn, where nothing is loaded, all
four have room for their prompts at once, but not for their answers."""
CROWDED: dict[str, Any] = {
    "conversations": 8, "turns": 3, "first_tokens": 420, "turn_tokens": 160, "answer_tokens": 40,
}  # fmt: skip
"""In the last turn, two of these prompts would load at once without enough blocks for both."""


@pytest.mark.parametrize(("name", "group"), SHOWING)
def test_corrupt_blocks_of_one_group_change_answers(
    hybrids: Hybrids, tmp_path: Path, name: str, group: int
) -> None:
    """The negative control: answers depend on every group's bytes."""
    plan = hybrids.small(name)
    told = hybrids.run(name, tmp_path, connector="own", corrupt_loads=True, group=group, **plan)
    assert hybrids.wrong(name, told) >= 10


@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_the_stand_in_has_the_same_teeth(
    hybrids: Hybrids, tmp_path: Path, name: str, group: int
) -> None:
    """A crude connector that keeps everything answers rightly, and wrongly if one group is bad.

    It loads without regard for the blocks that are left, so in a small device cache vLLM may stand
    still.
    """
    plan = hybrids.emptied(name)
    for extra in ({"failed_group": group, "fail_every": 3}, {"corrupt_group": group}):
        told = hybrids.run(name, tmp_path, connector="crude", extra=extra, **plan)
        assert told["leaked_blocks"] == 0
        assert min(told["external"][1:]) > 0
        wrong = hybrids.wrong(name, told)
        assert wrong >= 10 if "corrupt_group" in extra else wrong == 0


@support("feature", "several KV groups: loads that fail in one of them")
@pytest.mark.parametrize(("name", "group"), SHOWING)
def test_failed_loads_of_one_group_fail_whole(
    hybrids: Hybrids, tmp_path: Path, name: str, group: int
) -> None:
    """If a load fails in one group only, its request is computed, and every answer is right."""
    plan = hybrids.small(name)
    told = hybrids.run(
        name, tmp_path, connector="own", failed_loads=0.2, group=group, aborts=0.2, **plan
    )
    check_sound(told)
    assert hybrids.wrong(name, told) == 0
    assert told["server"]["statistics"]["routes"]["host→device"]["failed_ops"] > 0
    assert told["aborted"] > 0


@support("feature", "several KV groups: corrupt blocks of one of them on SSD")
@pytest.mark.parametrize(("name", "group"), SHOWING)
def test_flipped_bits_of_one_group_are_never_loaded(
    hybrids: Hybrids, tmp_path: Path, name: str, group: int
) -> None:
    """If every block of one group on SSD has a flipped bit, every answer is right."""
    cache = {"num_cpu_blocks": 160, "num_ssd_blocks": 4096}
    faults = {"flip_files": str(tmp_path), "flush": True, "group": group}
    plan = hybrids.small(name)
    told = hybrids.run(name, tmp_path, connector="own", cache=cache, **faults, **plan)
    check_sound(told)
    assert hybrids.wrong(name, told) == 0
    assert told["flipped"] > 0


@support("feature", "several KV groups: preempted and aborted requests")
@pytest.mark.parametrize("name", [case(each) for each in SHORT_OF_BLOCKS])
@pytest.mark.parametrize("faults", [{}, {"failed_loads": 0.1, "aborts": 0.2}], ids=["", "faults"])
def test_preempted_requests_answer_the_same(
    hybrids: Hybrids, tmp_path: Path, name: str, faults: dict[str, Any]
) -> None:
    """Requests that are preempted in a small pool give the same answers."""
    engine = {"max_model_len": 900}
    (tmp_path / "without").mkdir()
    expected = hybrids.run(name, tmp_path / "without", engine=engine, **LONG_ANSWERS)
    engine = {**engine, "num_gpu_blocks_override": SHORT_OF_BLOCKS[name]}
    plan = {**LONG_ANSWERS, **faults, "engine": engine}
    told = hybrids.run(name, tmp_path, connector="own", **plan)
    check_sound(told)
    assert told["answers"] == expected["answers"]
    assert told["preemptions"] > 0


def test_loads_do_not_stop_an_engine_with_few_blocks(hybrids: Hybrids, tmp_path: Path) -> None:
    """Prompts that load leave each other enough blocks: all are answered, with the same answers.

    vLLM by itself takes more loads than the device has blocks for, and then stands still for ever.
    """
    engine = {"max_model_len": 900}
    (tmp_path / "without").mkdir()
    expected = hybrids.run("gemma3", tmp_path / "without", engine=engine, **CROWDED)
    engine = {**engine, "num_gpu_blocks_override": 64}
    told = hybrids.run("gemma3", tmp_path, connector="own", engine=engine, **CROWDED)
    check_sound(told)
    assert told["answers"] == expected["answers"]
    assert sum(told["external"]) > 0


@support("feature", "several KV groups: a warm start from SSD, after `kill -9` too")
@pytest.mark.parametrize("name", [case(each) for each in SEVERAL])
def test_an_engine_that_was_killed_is_warm_from_ssd(
    hybrids: Hybrids, tmp_path: Path, name: str
) -> None:
    """After `kill -9` of engine and server a new engine is warm from SSD, in every group."""
    plan = {"connector": "own", "flush": True, **hybrids.small(name)}
    first = hybrids.start(name, tmp_path, **plan)
    told = first.told()
    os.kill(told["server"]["pid"], 9)
    first.kill()
    again = hybrids.run(name, tmp_path, **plan)
    check_sound(again)
    assert hybrids.wrong(name, again) == 0
    assert again["server"]["statistics"]["restored_blocks"] > 50
    # The first turn hits as far as a prompt that is asked again may.
    assert min(again["cached"][0]) > 0
    assert again["server"]["statistics"]["routes"]["disk→host"]["blocks"] > 50
