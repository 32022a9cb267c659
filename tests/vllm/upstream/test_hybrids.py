"""Scenarios of models with several KV groups, in vLLM's scheduler."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexkv.integration.common.request_transfers import with_leaves

from .hybrid_stand import MODELS, WINDOW, HybridStand, _group, _window
from .stand import PER_BLOCK, TOKEN, WAITING

Make = Callable[..., HybridStand]
LONG = 230
"""Tokens of a prompt whose last whole blocks are in all groups; none is a chunk's last one."""
RECURRENT = ("states", "states_and_windows", "states_beside_windows")
LEFT_OUT = {"ring": [0], "replayed": [0, 1]}
"""The groups of some models that vLLM makes anew after each hit."""
SEVERAL = [name for name in MODELS if name not in ("indexer", *LEFT_OUT)]
SOME = ["windows", "states", "states_and_windows", "window_alone"]
"""The models of most cases; with ALL_SCENARIOS=1 they run over every model."""
if os.environ.get("ALL_SCENARIOS"):
    SOME = SEVERAL


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Yield a function that makes an engine; close the engines afterwards."""
    made: list[HybridStand] = []

    def begin(model: str, **more: Any) -> HybridStand:
        made.append(HybridStand(tmp_path, monkeypatch, model, **more))
        return made[-1]

    yield begin
    for stand in made:
        stand.close()


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Return a prompt."""
    return random.Random(seed).choices(range(1000), k=tokens)


def moved(stand: HybridStand, end: int, local: int = 0) -> int:
    """Return how many blocks of the chain a load moves, between these two numbers of tokens.

    In a model without full attention these are only the last window's.
    """
    window, tokens = stand.side.engine_groups.shape(0).window, stand.chain_tokens
    first = max(0, end - window + 1) if window else 0
    return end // tokens - max(first, local) // tokens


@pytest.mark.parametrize(
    ("model", "chunk"), [*((name, 1024) for name in MODELS), *((name, 48) for name in SOME)]
)
def test_a_conversation_is_loaded_at_every_turn(make: Make, model: str, chunk: int) -> None:
    """Every turn loads what the last one has computed, up to the last end of a prefix."""
    stand = make(model, max_num_batched_tokens=chunk)
    talk = stand.answer("first", prompt(200), max_tokens=20)
    stand.counts()
    for turn in range(3):
        last_prompt = len(talk) - 20
        talk = stand.answer(f"turn {turn}", [*talk, *prompt(50, turn)], max_tokens=20)
        counts = stand.counts()
        kept = last_prompt - 1 if model in RECURRENT else last_prompt + 19
        wanted = moved(stand, kept // stand.unit * stand.unit)
        assert (counts["loaded_blocks"], counts["failed_blocks"]) == (wanted, 0)
    stand.check_empty()


@pytest.mark.parametrize("model", ["windows", "larger_windows"])
@pytest.mark.parametrize("answered", [20, 36])
def test_an_end_is_stored_whose_first_window_block_the_device_has_given_up(
    make: Make, model: str, answered: int
) -> None:
    """What the request has loaded, or stored at the end of its prompt, completes such an end.

    A request ends just before its next block would be whole, so its window begins one block later
    than that of its last whole block.
    """
    stand = make(model)
    talk = prompt(2 * stand.unit)
    for turn in range(3):
        last = -(-(len(talk) + 20) // stand.unit) * stand.unit + stand.unit - 1
        talk = [*talk, *prompt(last + 1 - answered - len(talk), turn)]
        talk = stand.answer(f"turn {turn}", talk, max_tokens=answered)
        stand.counts()
        stand.answer(f"again {turn}", [*talk, 1, 2])
        kept = (len(talk) - 1) // stand.unit * stand.unit // stand.chain_tokens
        assert stand.counts()["loaded_blocks"] == kept
    stand.check_empty()


@pytest.mark.parametrize("model", SOME)
def test_the_last_token_is_always_computed(make: Make, model: str) -> None:
    """The same prompt again, of whole blocks, is never loaded to its end."""
    stand = make(model)
    tokens = prompt(4 * stand.unit)
    stand.answer("first", tokens)
    stand.counts()
    stand.answer("again", tokens)
    assert stand.counts()["loaded_blocks"] == 3 * stand.unit // stand.chain_tokens
    stand.check_empty()


@pytest.mark.parametrize("model", SOME)
def test_two_prompts_that_part_load_what_they_share(make: Make, model: str) -> None:
    """The second prompt stores what a hit needs where it parts from the first; the third loads it.

    vLLM cuts its chunks there for states only if its own cache has seen the first prompt.
    """
    stand = make(model, num_blocks=160, max_num_batched_tokens=512)
    shared = prompt(10 * stand.unit)
    for turn in range(3):
        stand.answer(f"turn {turn}", [*shared, *prompt(100, turn)])
    counts = stand.counts()
    expected = 0 if model in RECURRENT else moved(stand, 10 * stand.unit)
    assert counts["loaded_blocks"] >= expected
    stand.check_empty()


@pytest.mark.parametrize("model", SOME)
def test_what_the_device_has_is_continued(make: Make, model: str) -> None:
    """A prompt whose beginning the device has loads the rest, where that is proved right."""
    stand = make(model)
    talk = stand.answer("first", prompt(20 * PER_BLOCK + 3))
    stand.counts()
    stand.ask("local", talk[: 8 * PER_BLOCK + 1])
    stand.run()
    assert stand.counts()["loaded_blocks"] in (0, moved(stand, 8 * PER_BLOCK))
    stand.ask("mixed", talk)
    stand.run()
    assert stand.counts()["loaded_blocks"] == moved(stand, 20 * PER_BLOCK, 8 * PER_BLOCK)
    stand.check_empty()


@pytest.mark.parametrize("model", SOME)
def test_a_load_that_fails_in_one_group_fails_whole(make: Make, model: str) -> None:
    """The request is computed from its first token on, and is offered nothing again."""
    stand = make(model)
    talk = stand.answer("first", prompt(LONG))
    for number in range(len(MODELS[model])):
        stand.counts()
        request = stand.ask(f"fails in {number}", talk)
        failing: set[int] = set()
        stand.copies.loads_fail = failing.intersection
        stand.copies.holds_loads = True
        stand.step()
        assert request.status is WAITING
        failing.update(block for block in stand.tables(request)[number] if block)
        stand.copies.release()
        stand.run()
        counts = stand.counts()
        assert (counts["loads"], counts["loaded_blocks"]) == (1, 0)
        assert request.num_preemptions == 0
        stand.copies.loads_fail = lambda blocks: False
        assert stand.scheduler.reset_prefix_cache()
    stand.check_empty()


@pytest.mark.parametrize("local", [0, 8 * PER_BLOCK])
@pytest.mark.parametrize("model", SOME)
def test_a_failed_load_leaves_nothing_in_the_devices_cache(
    make: Make, model: str, local: int
) -> None:
    """Whichever of two requests for it begins first hits only what the device had before.

    The other one then hits what the first has computed. Either load may end first.
    """
    stand = make(model, max_num_seqs=1, num_blocks=160)
    talk = stand.answer("first", prompt(LONG))
    for number in range(len(MODELS[model])):
        if local:
            stand.ask("before", talk[: local + 1])
            stand.run()
        failing: set[int] = set()
        stand.copies.loads_fail = failing.intersection
        stand.copies.holds_loads = True
        requests = [stand.ask(name, talk) for name in ("fails", "fails, too")]
        stand.step()
        for request in requests:
            assert request.status is WAITING
            failing.update(block for block in stand.tables(request)[number][local // PER_BLOCK :])
        failing.discard(0)
        stand.copies.release()
        begun = dict[str, int]()
        while not stand.is_idle:
            for new in stand.step().output.scheduled_new_reqs:
                begun[new.req_id] = new.num_computed_tokens
        assert list(begun.values()) == [local, LONG // PER_BLOCK * PER_BLOCK]
        stand.copies.loads_fail = lambda blocks: False
        assert stand.scheduler.reset_prefix_cache()
    stand.check_empty()


@pytest.mark.parametrize("model", SOME)
def test_blocks_of_an_aborted_load_come_back(make: Make, model: str) -> None:
    """A request that is aborted while it loads gives its blocks of all groups back, once."""
    stand = make(model)
    talk = stand.answer("first", prompt(200))
    stand.copies.holds_loads = True
    request = stand.ask("aborted", talk)
    stand.step()
    assert request.status is WAITING
    stand.abort(request)
    stand.step()
    stand.copies.release()
    stand.run()
    stand.check_empty()


@pytest.mark.parametrize("model", SOME)
def test_a_wrong_block_is_noticed(make: Make, model: str) -> None:
    """The negative control: each group's loaded bytes matter to the forward."""
    stand = make(model)
    talk = stand.answer("first", prompt(LONG))
    stand.unchecked = True
    for number, group in enumerate(MODELS[model]):
        stand.copies.holds_loads = True
        request = stand.ask(f"wrong in {number}", talk)
        stand.step()
        blocks = [block for block in stand.tables(request)[number] if block]
        stand.copies.release()
        stand.until(lambda: stand.step().told.finished_recving)
        assert stand.wrong == []
        stand.kv_caches[group.layer_names[0]][blocks] += 1
        stand.run()
        assert group.layer_names[0] in stand.wrong.pop()
        stand.wrong.clear()
        assert stand.scheduler.reset_prefix_cache()
    stand.check_empty()


@pytest.mark.parametrize("behind", [0, 1], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("model", SOME)
def test_many_requests_on_a_small_device(make: Make, model: str, behind: int) -> None:
    """With preemptions, aborts, failures and slow copies no forward reads a wrong value."""
    chance = random.Random(model + str(behind))
    stand = make(
        model, num_blocks=150, max_num_batched_tokens=96, behind=behind, max_num_seqs=6,
        cache={"num_cpu_blocks": 256},
    )  # fmt: skip
    stand.copies.lasts_s = lambda: chance.choice([0.0, 0.0, 0.002, 0.01])
    stand.copies.loads_fail = lambda blocks: chance.random() < 0.1
    talks = [prompt(chance.randrange(20, 150), seed) for seed in range(5)]
    for turn in range(4):
        asked = [
            stand.ask(f"{turn} {number}", talk, max_tokens=chance.randrange(1, 40))
            for number, talk in enumerate(talks)
        ]
        steps = 0
        while not stand.is_idle:
            stand.step()
            steps += 1
            if steps == 5 and chance.random() < 0.5:
                stand.abort(chance.choice(asked))
            assert steps < 20000
        talks = [[*talk, *prompt(30, turn)] for talk in talks]
        if chance.random() < 0.5:
            stand.scheduler.reset_prefix_cache()
    stand.check_empty()


def watch(stand: HybridStand, left_out: Sequence[int] = ()) -> Counter[str]:
    """Check that gets and puts name only blocks that their request has; return their counts.

    Null blocks and blocks of groups that are left out are not among these.
    """
    client, named = stand.side.client, Counter[str]()
    get, put = client.get, client.put

    def check(ids: Any, leaves: Any) -> None:
        (request,) = stand.scheduler.requests.values()
        its = set[int]()
        for number, table in enumerate(stand.tables(request)):
            its |= set(table) - {0} if number not in left_out else set()
        assert its.issuperset(with_leaves(ids, leaves).tolist())

    def getting(part: Any, first: int, ids: Any, found: int, gated: bool, leaves: Any) -> Any:
        check(ids, leaves)
        assert part.blocks % (stand.unit // PER_BLOCK) == 0
        named["get"] += 1
        return get(part, first, ids, found, gated, leaves)

    def putting(part: Any, first: int, ids: Any, *more: Any, leaves: Any) -> Any:
        check(ids, leaves)
        named["put"] += 1
        return put(part, first, ids, *more, leaves=leaves)

    client.get, client.put = getting, putting
    return named


@pytest.mark.parametrize("model", [*LEFT_OUT, "window_alone", "windows_alone"])
def test_only_blocks_that_a_request_has_are_touched(make: Make, model: str) -> None:
    """Gets and puts name no null block, none that is gone, and none of a group that is left out.

    Hits end on vLLM's alignment, and loads write all groups that vLLM does not make anew.
    """
    stand = make(model, max_num_batched_tokens=96)
    left_out = LEFT_OUT.get(model, [])
    named, talk = watch(stand, left_out), prompt(150)
    for turn in range(4):
        request = stand.ask(f"turn {turn}", talk, max_tokens=20)
        stand.run()
        assert (named["get"], named["put"] > turn) == (turn, True)
        assert stand.scheduler.reset_prefix_cache()
        talk = [*talk, *[TOKEN] * 20, *prompt(30, turn)]
    groups = stand.scheduler.connector.get_loaded_kv_cache_group_ids(request)
    assert {*groups, *left_out} == set(range(len(MODELS[model])))
    stand.check_empty()


def test_blocks_of_a_window_that_a_put_has_lost_are_not_stored_later(make: Make) -> None:
    """A put is cancelled if the next step writes its blocks: vLLM has given them to other tokens.

    Later puts, one for each further block, store nothing, since blocks before theirs are missing.
    """
    stand = make("window_alone", num_blocks=14, max_num_batched_tokens=64)
    named, lasts_s = watch(stand), iter([0.0, 0.4])
    stand.copies.lasts_s = lambda: next(lasts_s, 0.0)
    talk = stand.answer("first", prompt(LONG), max_tokens=40)
    counts = stand.counts()
    assert counts["failed_puts"] > 0
    assert counts["stored_blocks"] < LONG // PER_BLOCK
    assert named["put"] < len(talk) // PER_BLOCK
    for blocks in range(1, len(talk) // PER_BLOCK):
        stand.answer(f"{blocks} blocks", talk[: blocks * PER_BLOCK + 1])
        found = stand.counts()["offered_blocks"]
        assert found == blocks if blocks <= counts["stored_blocks"] else found < blocks
    stand.check_empty()


def test_the_end_of_a_request_reads_no_block_that_it_gave_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put fails; until the request ends, its first blocks are another one's, and not stored."""
    groups = [_group(_window(sliding_window=WINDOW - 8), "w0"), _group(_window(), "w1")]
    monkeypatch.setitem(MODELS, "pair", groups)
    stand = make("pair", num_blocks=30)
    talk = prompt(8 * PER_BLOCK + 5)
    stand.copies.holds_puts = True
    first = stand.ask("first", talk, max_tokens=2)
    stand.step()
    transfers = stand.side._states["first"].transfers
    stand.side.client.cancel(list(transfers.puts))
    stand.copies.release()
    stand.until(lambda: (stand.side.transfers.poll(), not transfers.puts)[1])
    other = stand.ask("other", prompt(len(talk), 1))
    given = set[int]()
    while not first.is_finished():
        stand.step()
        given.update(*stand.tables(other))
    read = {block for put in transfers.puts.values() for block in put.block_ids.tolist()}
    assert not read & given
    stand.run()
    assert stand.scheduler.reset_prefix_cache()
    for blocks in range(1, 9):  # the forward checks what is loaded
        stand.answer(f"{blocks} blocks", talk[: blocks * PER_BLOCK + 1])
    stand.check_empty()


def test_a_hit_that_would_be_replayed_wholly_is_not_loaded(make: Make) -> None:
    """Its blocks are released, and the prompt is computed."""
    stand = make("replayed")
    talk = stand.answer("first", prompt(WINDOW + 3))
    assert stand.counts()["stored_blocks"] == WINDOW // PER_BLOCK
    stand.answer("again", talk)
    counts = stand.counts()
    assert (counts["hits"], counts["loads"]) == (1, 0)
    stand.check_empty()
