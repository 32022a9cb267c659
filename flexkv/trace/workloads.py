"""Request traces that are made, not recorded: the same for the same seed.

    templates    what many prompts begin with: a system prompt, the description of tools, a document
    sessions     a request may go on with an earlier prompt: all of it but its last block, and more
    the rest     is nobody else's

They are sized after what is published of Mooncake's traces (FAST '25): requests, seconds, lengths
of prompts, and the share of blocks that an endless cache hits. What they are about, and with that
how soon a prompt comes again, is a guess. Each block has 512 tokens, as in those traces.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, count
from math import exp
from random import Random
from typing import Final, NamedTuple

from flexkv.common.errors import ConfigError
from flexkv.trace.mooncake import TOKENS_PER_HASH_ID, TraceLine


class Workload(NamedTuple):
    """The shape of a trace.

    Attributes:
        requests: how many there are.
        seconds: in which they arrive.
        output_tokens: of each.
        templates: how many there are, how much more often the first ones come (the n-th has the
            weight n ** -skew), and their blocks: the median, and sigma of the logarithm.
        new_blocks: of a request: the median, and sigma of the logarithm.
        goes_on: the share of requests that go on with an earlier prompt.
        pause_s: how long before that one came, in the median.
    """

    requests: int
    seconds: int
    output_tokens: int
    templates: tuple[int, float, float, float]
    new_blocks: tuple[float, float]
    goes_on: float
    pause_s: float


WORKLOADS: Final = {
    "conversation-like": Workload(12_031, 3537, 342, (1, 0.0, 1.0, 0.0), (7.7, 1.15), 0.38, 120.0),
    "tool-agent": Workload(23_608, 3537, 182, (400, 0.9, 5.8, 1.0), (4.15, 1.0), 0.11, 20.0),
    "synthetic": Workload(3_993, 1022, 149, (620, 0.4, 13.5, 0.9), (5.1, 0.9), 0.25, 60.0),
}
PAUSE_SPREAD: Final = 0.9
BLOCKS_MAX: Final = 250
"""A prompt has no more than 128,000 tokens."""


def workload_of(name: str) -> Workload:
    """Return the workload of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in WORKLOADS:
        raise ConfigError("workload", name, f"must be one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def made_trace(shape: Workload, seed: int, limit: int | None = None) -> Iterator[TraceLine]:
    """Yield the requests of a trace in order, at most `limit` of them."""
    random, new_ids = Random(seed), count()
    many, skew, *blocks = shape.templates
    templates = [_some(new_ids, _blocks(random, *blocks)) for _ in range(many)]
    weights = list(accumulate((n + 1) ** -skew for n in range(many)))
    times_s: list[float] = []
    prompts: list[list[int]] = []
    now_s = 0.0
    for _ in range(shape.requests if limit is None else min(limit, shape.requests)):
        now_s += random.expovariate(shape.requests / shape.seconds)
        before_s = now_s - shape.pause_s * exp(random.gauss(0.0, PAUSE_SPREAD))
        earlier = bisect_right(times_s, before_s) - 1
        if random.random() < shape.goes_on and earlier >= 0:
            begin = prompts[earlier][:-1]
        else:
            (begin,) = random.choices(templates, cum_weights=weights)
        room = BLOCKS_MAX - len(begin)
        new = _some(new_ids, max(1, min(room, _blocks(random, *shape.new_blocks))))
        ids = [*begin, *new]
        times_s.append(now_s)
        prompts.append(ids)
        tokens = len(ids) * TOKENS_PER_HASH_ID - random.randrange(TOKENS_PER_HASH_ID)
        yield TraceLine(round(1000 * now_s), tokens, shape.output_tokens, ids)


def _blocks(random: Random, median: float, spread: float) -> int:
    return min(BLOCKS_MAX, max(1, round(median * exp(random.gauss(0.0, spread)))))


def _some(new_ids: Iterator[int], blocks: int) -> list[int]:
    return [next(new_ids) for _ in range(blocks)]
