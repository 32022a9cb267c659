"""Conversations whose prompts grow by the answers, for every kind of engine."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

WORDS = range(3, 1000)
"""The tokens that prompts are made of."""


@dataclass
class Sizes:
    """Sizes of conversations, in tokens."""

    conversations: int = 8
    turns: int = 8
    first_tokens: int = 500
    turn_tokens: int = 60
    answer_tokens: int = 12
    seed: int = 0


class Conversations:
    """Conversations with their prompts, the answers by turn, and how many tokens were hit."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._words = random.Random(sizes.seed)
        self.prompts = [self._said(sizes.first_tokens, []) for _ in range(sizes.conversations)]
        self.answers: list[list[list[int]]] = []
        self.cached: list[list[int]] = []

    def _said(self, count: int, before: list[int]) -> list[int]:
        """Return `count` tokens to be said after `before`."""
        return [self._words.choice(WORDS) for _ in range(count)]

    def answered(
        self, answers: list[list[int]], cached: list[int], script: list[list[int]] | None = None
    ) -> None:
        """Record a turn's answers and hit tokens; extend each prompt by its answer and more.

        With a script each prompt goes on as if the answer had been the script's, so that a wrong
        answer does not change what is asked later.
        """
        self.answers.append(answers)
        self.cached.append(cached)
        for prompt, answer in zip(self.prompts, script or answers, strict=True):
            prompt += answer
            prompt += self._said(self._sizes.turn_tokens, prompt)


class Recitals(Conversations):
    """Conversations whose prompts each end with a word that was said exactly once before.

    A model that recites answers with the words that followed it there. Each of these was said only
    once, so the answer is certain.
    """

    def _said(self, count: int, before: list[int]) -> list[int]:
        known = set(before)
        new = self._words.sample([word for word in WORDS if word not in known], count - 1)
        said = before or new
        length = self._sizes.answer_tokens + 1
        times = Counter(said)
        places = [
            place
            for place in range(len(said) - length)
            if all(times[word] == 1 for word in said[place : place + length])
        ]
        return [*new, said[self._words.choice(places)]]


def recited(prompt: list[int], count: int) -> list[int]:
    """Return what a model that recites answers to a prompt."""
    said = list(prompt)
    for _ in range(count):
        said.append(said[said.index(said[-1]) + 1])
    return said[len(prompt) :]


def asked_in(sizes: Sizes, answers: list[list[list[int]]]) -> list[list[int]]:
    """Return every prompt of conversations that were answered like this, turn by turn."""
    conversations, asked = Conversations(sizes), []
    for answered in answers:
        asked += [list(prompt) for prompt in conversations.prompts]
        conversations.answered(answered, [])
    return asked
