"""Prompts of a chat service: conversations that grow, pause, resume and share system prompts."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Prompt(NamedTuple):
    """One request: its arrival, and all tokens that have KV when it ends."""

    at_s: float
    tokens: NDArray[np.int64]


class ChatShape(NamedTuple):
    """The number and lengths of conversations."""

    conversations: int = 250
    """Conversations that are open at once."""
    system_prompts: int = 4
    system_tokens: int = 256
    turn_tokens_max: int = 192
    turns_max: int = 12


def chat(requests: int, seed: int, shape: ChatShape) -> Iterator[Prompt]:
    """Yield the requests of a multi-turn chat workload, the same for the same seed.

    Each request is a turn of one conversation: its whole history and new tokens. A conversation
    that is over is replaced by a new one. Recently active ones are more likely to be next.
    """
    random = Random(seed)
    systems = [_tokens(random, shape.system_tokens) for _ in range(shape.system_prompts)]
    histories = [random.choice(systems) for _ in range(shape.conversations)]
    turns = [0] * shape.conversations
    for number in range(requests):
        # The square favours the front of the list, where the recently active ones are.
        place = int(random.random() ** 2 * len(histories))
        history, turn = histories.pop(place), turns.pop(place)
        if turn >= random.randint(2, shape.turns_max):
            history, turn = random.choice(systems), 0
        new = _tokens(random, random.randint(8, shape.turn_tokens_max))
        history = np.concatenate([history, new])
        histories.insert(0, history)
        turns.insert(0, turn + 1)
        yield Prompt(float(number), history)


def _tokens(random: Random, count: int) -> NDArray[np.int64]:
    """Return random token ids."""
    return np.array([random.randrange(1, 50_000) for _ in range(count)], np.int64)
