"""Random mixtures of everything: what is read is right at every step, and nothing is left.

Requests share prefixes, in a pool so small that they are preempted. Loads fail, copies take long,
and requests are aborted; also where a step is scheduled while the one before it runs.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress

import pytest
from vllm.v1.request import RequestStatus

from .conftest import Make
from .stand import PER_BLOCK, Stand

REQUESTS = 80
SEEDS = int(os.environ.get("MIXTURE_SEEDS", "2"))


def go(stand: Stand, chance: random.Random) -> int:
    """Run requests that come and go; return how often they were preempted."""
    requests, alive = [], []
    while len(requests) < REQUESTS or not stand.is_idle:
        if len(requests) < REQUESTS and chance.random() < 0.4:
            tokens = chance.randrange(2, 7 * PER_BLOCK)
            name, most = f"r{len(requests)}", chance.randrange(1, 2 * PER_BLOCK)
            requests.append(stand.add(chance.randrange(1, 6), tokens, name=name, max_tokens=most))
        alive = [request for request in requests if not request.is_finished()]
        if alive and chance.random() < 0.03:
            name = chance.choice(alive).request_id
            stand.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        if chance.random() < 0.06:
            with suppress(RuntimeError):  # blocks that copies use stay
                stand.scheduler.reset_prefix_cache(reset_running_requests=True)
        stand.step()
    return sum(request.num_preemptions for request in requests)


@pytest.mark.parametrize("behind", [0, 1], ids=["", "a_step_behind"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_comes(make: Make, behind: int, seed: int) -> None:
    """Whatever comes, reads are right and nothing is left. Seeds fix requests, not copies' ends."""
    stand = make(
        num_blocks=20, behind=behind, max_num_batched_tokens=4 * PER_BLOCK, max_num_seqs=4,
        kv_load_failure_policy="recompute", cache={"num_cpu_blocks": 32, "num_ssd_blocks": 64},
    )  # fmt: skip
    faults = random.Random(seed)
    stand.copies.loads_fail = lambda blocks: faults.random() < 0.15
    stand.copies.lasts_s = lambda: faults.choice([0.0, 0.002, 0.01, 0.05])
    preempted = go(stand, random.Random(seed))
    assert preempted > 0
    assert len(stand.copies.device_blocks) > 3
    stand.check_empty()
