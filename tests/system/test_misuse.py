"""Tests of invalid arguments: each is refused by its name, and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexkv.common.config import CacheConfig, Settings
from flexkv.common.errors import ConfigError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.index.keys import Scope
from flexkv.kvmanager import KVManager
from flexkv.server.client import Client

from .clients import started_client
from .conftest import MODEL, PER_BLOCK, cache_config, kv_caches, slots_of

PROMPT = np.arange(4 * PER_BLOCK)
SLOTS = slots_of(range(4))


class Odd:
    """An object that claims to be an array, and raises an unusual error."""

    def __array__(self, *_: object, **__: object) -> Any:
        raise LookupError("no array")


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVManager]:
    """Yield a manager with KV caches."""
    made = KVManager(MODEL, cache_config(tmp_path_factory.mktemp("misuse")))
    made.start()
    made.register_kv_caches(kv_caches())
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVManager]:
    """Yield a manager with KV caches whose engine is in a server's process."""
    with started_client(tmp_path_factory.mktemp("misuse")) as made:
        made.register_kv_caches(kv_caches())
        yield made


@pytest.fixture(params=["manager", "client"])
def either(request: pytest.FixtureRequest) -> KVManager:
    """Return a manager with an engine of its own, or with a server's."""
    made: KVManager = request.getfixturevalue(request.param)
    return made


def refused(field: str, call: Callable[[], Any]) -> None:
    """Check that a call is refused by the name of its argument, in a short message."""
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.field.split("[")[0] == field, caught.value
    assert len(str(caught.value)) < 400


def named(wrong: object) -> str:
    """Return the name of a test case, the same in every process."""
    text = repr(wrong)
    return type(wrong).__name__ if " at 0x" in text else text[:40]


NO_TOKENS = [
    None, "abc", b"abc", 5, 5.0, 1.5, {}, {1, 2}, object(), Odd(), (n for n in range(8)),
    [1.0, 2.0], ["a", "b"], [None, 1], [[1, 2], [3]], [[1, 2], [3, 4]], [-1, 2], [2**32],
    [10**30], np.zeros((2, 4), np.int64), np.zeros(4), np.zeros(4, bool), np.array([1, "a"]),
    np.array([1, 2], object), np.array([1, None], object), np.array(["1"]), np.float32(3),
    np.array([-1]), np.array([2**63], np.uint64), np.zeros(4, "V8"), np.zeros(4, np.complex64),
    np.zeros(4, "M8[s]"), torch.zeros(4), torch.zeros(2, 4, dtype=torch.int64),
    torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, requires_grad=True),
    torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros(4, dtype=torch.int64).to_sparse(),
    "x" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("wrong", NO_TOKENS, ids=named)
def test_tokens_are_integers_in_one_dimension(manager: KVManager, wrong: Any) -> None:
    """Every call that takes a prompt refuses what is no 1-D array of token ids."""
    for call in (
        lambda: manager.match(wrong), lambda: manager.get_match(wrong),
        lambda: manager.put_match(wrong), lambda: manager.get_async(wrong, SLOTS),
        lambda: manager.put_async(wrong, SLOTS), lambda: manager.prefetch_async(wrong),
        lambda: manager.explain("get", wrong), lambda: manager.get_layerwise(wrong, SLOTS),
        lambda: asyncio.run(manager.get(wrong, SLOTS)),
        lambda: asyncio.run(manager.put(wrong, SLOTS)),
        lambda: asyncio.run(manager.prefetch(wrong)),
        *((lambda: manager.pin(wrong),) if wrong is not None else ()),
    ):  # fmt: skip
        refused("token_ids", call)
    assert manager.statistics().claims == 0


SLOTS_WRONG = [
    *(wrong for wrong in NO_TOKENS if wrong is not None), None, [], SLOTS[:-1], SLOTS.tolist()[1:],
    -SLOTS, SLOTS + 1, SLOTS[::-1], SLOTS + 10**9, SLOTS + 2**62, [10**30] * 16, SLOTS * 0,
    np.concatenate([SLOTS[:8], SLOTS[:8]]), np.concatenate([SLOTS[:12], SLOTS[4:8]]),
]  # fmt: skip


@pytest.mark.parametrize("wrong", SLOTS_WRONG, ids=named)
def test_slots_are_those_of_distinct_device_blocks(manager: KVManager, wrong: Any) -> None:
    """Slots that are not those of distinct device blocks, one for each token, are refused."""
    for call in (
        lambda: manager.get_async(PROMPT, wrong), lambda: manager.put_async(PROMPT, wrong),
        lambda: asyncio.run(manager.get(PROMPT, wrong)),
        lambda: asyncio.run(manager.put(PROMPT, wrong)),
        lambda: manager.put_layerwise(PROMPT, wrong),
    ):  # fmt: skip
        refused("slot_mapping", call)
    assert manager.match(PROMPT).tokens == 0


def test_a_block_that_is_named_twice_is_told_with_both_places(either: KVManager) -> None:
    """The error for a block named twice has both indices, also behind tokens that fill no block."""
    again = np.concatenate([SLOTS[:12], SLOTS[4:8]])
    with pytest.raises(ConfigError, match=r"slot_mapping\[12\]=4: .* block 1, .*slot_mapping\[4\]"):
        either.put_async(PROMPT, again)
    mask = np.arange(len(PROMPT)) >= 2
    with pytest.raises(ConfigError, match=r"slot_mapping\[10\]=4: .* block 1, .*slot_mapping\[2\]"):
        either.put_async(PROMPT, again[2:], mask)


@pytest.mark.parametrize(
    "wrong",
    [
        "abc", 5, object(), Odd(), [], [True], [1] * 16, [[True], [False, True]], np.ones(16),
        np.ones(15, bool), np.ones((4, 4), bool), np.array([True] * 16, object),
        np.array(["True"] * 16), torch.ones(16), torch.ones(16, dtype=torch.bool, device="meta"),
        [True, False] * 8, (True for _ in range(16)), {}, np.ones(16, np.uint8),
    ],
    ids=named,
)  # fmt: skip
def test_masks_are_truth_values_without_holes(either: KVManager, wrong: Any) -> None:
    """Masks that are not of booleans, one for each token and without holes, are refused."""
    refused("token_mask", lambda: either.get_async(PROMPT, SLOTS, wrong))
    refused("token_mask", lambda: either.get_match(PROMPT, wrong))
    refused("token_mask", lambda: asyncio.run(either.put(PROMPT, SLOTS, wrong)))


@pytest.mark.parametrize(
    "wrong",
    [
        5, 1.5, b"a", {"a": 1}, [1], ["a", None], "\ud800", ["a", "\ud800"], object(),
        Scope(extra_keys=5), Scope(extra_keys="abc"), Scope(extra_keys=[5]),
        Scope(extra_keys=["abc"]), Scope(extra_keys=[(0, 4)]), Scope(extra_keys=[(0, 4, "a", 1)]),
        Scope(extra_keys=[(4, 0, "a")]), Scope(extra_keys=[(-1, 4, "a")]),
        Scope(extra_keys=[(0.0, 4, "a")]), Scope(extra_keys=[("0", 4, "a")]),
        Scope(extra_keys=[(False, True, "a")]), Scope(extra_keys=[(0, 4, 5)]),
        Scope(extra_keys=[(0, 4, b"a")]), Scope(extra_keys=[(0, 4, "\ud800")]),
        Scope(extra_keys=[(0, None, "a")]), Scope(extra_keys={(0, 4, "a"): 1}), Scope(parts=5),
        Scope(parts=(1,)), Scope(extra_keys=None),
    ],
    ids=named,
)  # fmt: skip
def test_namespaces_are_strings(manager: KVManager, wrong: Any) -> None:
    """Namespaces must be strings, and extra keys must be ranges of tokens with a string."""
    for call in (
        lambda: manager.match(PROMPT, wrong), lambda: manager.get_async(PROMPT, SLOTS, None, wrong),
        lambda: manager.prefetch_async(PROMPT, wrong), lambda: manager.namespace_blocks(wrong),
        lambda: manager.clear(None, wrong), lambda: manager.set_quota(wrong, Tier.HOST, 5),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.field.startswith("namespace"), caught.value


def test_extra_keys_may_be_of_any_integers(manager: KVManager) -> None:
    """Extra keys may be lists with numpy integers: the block keys are the same."""
    one = manager.engine.requests.intake  # it derives the block keys
    from flexkv.common.request import Operation

    keys = [
        one(Operation.PREFETCH, PROMPT, None, Scope((), extra)).keys
        for extra in (((0, 4, "a"),), [[np.int64(0), np.int32(4), "a"]])
    ]
    assert keys[0] == keys[1]


IDS_WRONG = ["abc", None, 1.5, {}, {"a": 1}, [1.5], ["1"], [None], [[1]], True, [True], object(),
             np.array([1.5]), np.zeros((2, 2), np.int64), np.float64(1), b"1", Odd()]  # fmt: skip


@pytest.mark.parametrize("wrong", IDS_WRONG, ids=named)
def test_task_ids_are_integers(either: KVManager, wrong: Any) -> None:
    """Every call that takes task ids refuses what is no integer or iterable of integers."""
    for call in (
        lambda: either.wait(wrong), lambda: either.try_wait(wrong),
        lambda: either.cancel(wrong), lambda: either.launch(wrong, SLOTS),
    ):  # fmt: skip
        refused("task_ids", call)


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint64, np.array, torch.tensor])
def test_task_ids_of_any_integer_serve(manager: KVManager, kind: Callable[[int], Any]) -> None:
    """Task ids may be integers of any kind, alone, in a list or from a generator."""
    for wrap in (lambda each: each, lambda each: [each], lambda each: (n for n in [each])):
        task_id, _ = manager.put_match(PROMPT)
        slots = SLOTS if wrap(5) == 5 else [SLOTS]
        manager.launch(wrap(kind(task_id)), slots)
        (response,) = manager.wait(wrap(kind(task_id))).values()
        assert response.status is KVResponseStatus.SUCCESS
        manager.reset()


@pytest.mark.parametrize("wrong", [None, 5, "abc", {}, b"ab", object()])
def test_each_task_is_launched_with_its_slots(either: KVManager, wrong: Any) -> None:
    """Tasks are launched only with slots, as a list for a list of ids."""
    task_id, _ = either.put_match(PROMPT)
    with pytest.raises(ConfigError, match="slot_mapping"):
        either.launch([task_id], wrong)
    with pytest.raises(ConfigError, match="slot_mapping"):
        either.launch(task_id, wrong)
    either.cancel(task_id)


@pytest.mark.parametrize("wrong", ["5", b"5", [5], object(), float("nan"), True, 5j, {}])
def test_times_are_numbers(manager: KVManager, wrong: Any) -> None:
    """Times that are no numbers of seconds are refused."""
    task_id = manager.prefetch_async(PROMPT)
    refused("timeout", lambda: manager.wait(task_id, timeout=wrong))
    refused("ttl_s", lambda: manager.pin(PROMPT, ttl_s=wrong))
    refused("completely", lambda: manager.wait(task_id, completely="no"))  # type: ignore[arg-type]
    assert manager.wait(task_id, timeout=np.float32(20))
    assert manager.wait(manager.prefetch_async(PROMPT), timeout=None)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("tier", lambda m: m.clear("host")),
        ("tier", lambda m: m.clear(1)),
        ("tier", lambda m: m.resize("host", 5)),
        ("tier", lambda m: m.resize(None, 5)),
        ("tier", lambda m: m.resize(Tier.PEER, 5)),
        ("tier", lambda m: m.set_quota("a", "host", 5)),
        ("capacity_blocks", lambda m: m.resize(Tier.HOST, "5")),
        ("capacity_blocks", lambda m: m.resize(Tier.HOST, 1.5)),
        ("capacity_blocks", lambda m: m.resize(Tier.HOST, 0)),
        ("capacity_blocks", lambda m: m.resize(Tier.HOST, 10**30)),
        ("blocks", lambda m: m.set_quota("a", Tier.HOST, "5")),
        ("blocks", lambda m: m.set_quota("a", Tier.HOST, True)),
        ("owner", lambda m: m.pin(PROMPT, owner=5)),
        ("owner", lambda m: m.unpin_owner(None)),
        ("pin_id", lambda m: m.unpin("x")),
        ("operation", lambda m: m.explain("fetch", PROMPT)),
        ("operation", lambda m: m.explain(5, PROMPT)),
        ("path", lambda m: m.trace_start(5)),
        ("tokens", lambda m: m.trace_start("x", tokens="yes")),
        ("trace_file_path", lambda m: m.trace_start("a\0b")),
        ("trace_file_path", lambda m: m.trace_start("/")),
        ("tp_rank", lambda m: m.resume_device(kv_caches(), tp_rank="0")),
        ("tp_rank", lambda m: m.resume_device(kv_caches(), tp_rank=None)),
        ("model", lambda m: KVManager({}, CacheConfig())),
        ("cache", lambda m: KVManager(MODEL, {})),
        ("cache", lambda m: KVManager(MODEL, MODEL)),
        ("settings", lambda m: KVManager(MODEL, settings={})),
        ("progress", lambda m: KVManager(MODEL, CacheConfig(), progress=5)),
    ],
)
def test_other_arguments_are_named(
    manager: KVManager, field: str, call: Callable[[KVManager], Any]
) -> None:
    """Every other invalid argument is refused by its own name."""
    refused(field, lambda: call(manager))


def test_layers_are_named(manager: KVManager) -> None:
    """Invalid layers, timeouts and streams of a layerwise request are refused by name."""
    get = manager.get_layerwise(PROMPT, SLOTS)
    for wrong in ("0", None, 1.5, -1, 3, True, 10**30):
        refused("layer", lambda wrong=wrong: get.wait_for_layer(wrong))  # type: ignore[misc]
    refused("timeout", lambda: get.wait_for_layer(0, "5"))  # type: ignore[arg-type]
    refused("stream", lambda: get.wait_for_layer(0, 5, "x"))  # type: ignore[arg-type]
    manager.wait(get.task_id)


def test_a_client_names_what_is_wrong(tmp_path: Path) -> None:
    """A client refuses invalid arguments by name before it sends anything."""
    client = Client(Settings(server_recv_port=f"ipc://{tmp_path}/socket"), MODEL)
    for wrong in NO_TOKENS:
        refused("token_ids", lambda wrong=wrong: client.keys(wrong))  # type: ignore[misc]
    for wrong in (None, 5, "abc", b"", b"abc", [b"a" * 16], bytearray(16)):
        refused("keys", lambda wrong=wrong: client.match(wrong))  # type: ignore[misc]
        refused("keys", lambda wrong=wrong: client.put(wrong, 0, SLOTS, 0))  # type: ignore[misc]
    for wrong in ([1.5], "abc", 5, np.zeros((2, 2), np.int64)):
        refused("device_ids", partial(client.put, b"a" * 32, 0, wrong, 0))
    refused("operation", lambda: client.start("get", b"a" * 32, 0, SLOTS))  # type: ignore[arg-type]
    client.close()
