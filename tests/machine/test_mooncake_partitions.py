"""Networks that fail and heal in the middle of reads by Mooncake: nothing lands in host memory.

`PARTITION_ROUNDS=200 PARTITION_SEED=7 pytest tests/machine/test_mooncake_partitions.py` runs 200.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv.testing.namespaces import drop_from
from tests.machine.bed import DEADLINE_S, Bed, BedNode, check_machine
from tests.machine.sharing_node import BLOCKS, PROMPT_BYTES

log = logging.getLogger(__name__)

pytestmark = pytest.mark.machine

ROUNDS = int(os.environ.get("PARTITION_ROUNDS", "6"))
SEED = int(os.environ.get("PARTITION_SEED", "1"))


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    """Yield an owner and a reader that move blocks by Mooncake."""
    check_machine()
    with Bed(tmp_path, 2, has_mooncake=True) as made:
        yield made


def until_read_by_mooncake(owner: BedNode, reader: BedNode, seeds: Iterator[int]) -> None:
    """Have the reader get new prompts until one of them comes by Mooncake."""
    for seed in seeds:
        before = reader.do("facts")["mooncake"]["blocks"]
        owner.do("put", seed=seed)
        reader.do("clear")
        got = reader.until("get", lambda got: got["blocks"] == BLOCKS, seed=seed)
        assert got["right"]
        if reader.do("facts")["mooncake"]["blocks"] >= before + BLOCKS:
            return


def test_nothing_lands_in_host_memory_after_a_read_has_failed(bed: Bed) -> None:
    """After the answer to a read that a partition has cut, 0 bytes of host memory change.

    Neither before the network is healed nor after it; Mooncake goes on writing to its window.
    When a quarter of that may still be written to, the mover is started again.
    """
    owner, reader = bed.nodes
    chance, seeds = random.Random(SEED), iter(range(1, 1 << 30))
    failed = late = 0
    for number in range(ROUNDS):
        until_read_by_mooncake(owner, reader, seeds)
        seed = next(seeds)
        owner.do("put", seed=seed)
        reader.until("known", lambda known: known["far"] == BLOCKS, seed=seed)
        before = reader.do("facts")["mooncake"]["failed"]
        cut_at = chance.randrange(PROMPT_BYTES // 8, PROMPT_BYTES)
        reader.host.suffers(drop_from(owner.host.address, cut_at))
        begun = reader.begin("get", seed=seed, area=1)
        if chance.random() < 0.5:
            owner.host.suffers(drop_from(reader.host.address, cut_at // 64))
        answer = reader.answer(begun)
        assert answer["right"], (number, answer)
        assert answer["took_s"] <= DEADLINE_S + 1, (number, answer)
        reader.is_free()
        failed += reader.do("facts")["mooncake"]["failed"] - before
        memory, window = reader.do("digest"), reader.do("window")
        bed.network.heal()
        bed.until_delivered()
        assert reader.do("digest") == memory, number
        now = reader.do("window")
        late += now["life"] == window["life"] and now != window
    facts = reader.do("facts")["mooncake"]
    log.info(
        "%d rounds: %d failed reads, late bytes in the window after %d, %d lives",
        ROUNDS, failed, late, facts["lives"],
    )  # fmt: skip
    assert failed >= ROUNDS // 2
    assert facts["lives"] > failed // 8
    for node in bed.nodes:
        node.is_free()
        assert node.end() == 0
