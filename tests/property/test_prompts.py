"""The keys of prompts that a client sends and a server keeps, against plain bytes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.server import prompts
from flexkv.server.prompts import KeptPrompts, Prompt, PromptPart, Sent, SentPrompts
from flexkv.server.wire import Match, ProtocolError

PROMPTS_MAX, KEYS_MAX, ALL_KEYS_MAX = 4, 12, 24
"""Small bounds, so that the client has to make the server forget prompts."""


def key_of(prompt: int, position: int) -> bytes:
    """Return a key that no other prompt and position has."""
    return bytes([prompt % 256, prompt // 256, position]).ljust(BLOCK_KEY_BYTES, b"k")


class BothEnds(RuleBasedStateMachine):
    """A client and its server, which may restart or lose the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(prompts, "PROMPTS_MAX", PROMPTS_MAX)
        self.patch.setattr(prompts, "PROMPT_BYTES_MAX", KEYS_MAX * BLOCK_KEY_BYTES)
        self.patch.setattr(prompts, "PROMPTS_BYTES_MAX", ALL_KEYS_MAX * BLOCK_KEY_BYTES)
        self.sent, self.kept = SentPrompts(), KeptPrompts()
        self.prompts: list[Prompt] = []
        self.numbers = 0

    def teardown(self) -> None:
        """Restore the bounds."""
        self.patch.undo()

    def say(self, sent: Sent) -> bytes:
        """Return the keys that the server derives from what the client sends."""
        if sent.outdated:
            self.kept.forget(tuple(sent.outdated))
        return self.kept.keys_of(Match(1, sent.keys, 0, False, False, sent.prompt, sent.known))

    @rule()
    def begins(self) -> None:
        """Begin a prompt."""
        self.numbers += 1
        self.prompts.append(Prompt(self.numbers, key_of(self.numbers, 0)))

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), more=st.integers(0, 5), fewer=st.integers(0, 8))
    def asks(self, data: Any, more: int, fewer: int) -> None:
        """Grow a prompt and ask for some of its blocks; the server derives the same keys."""
        prompt = data.draw(st.sampled_from(self.prompts))
        have = prompt.blocks
        for position in range(have + 1, have + 1 + more):
            prompt.keys += key_of(prompt.number, position)
        blocks = max(0, prompt.blocks - fewer)
        told = self.sent.part_of(PromptPart(prompt, blocks))
        assert self.say(told) == bytes(prompt.keys[: (blocks + 1) * BLOCK_KEY_BYTES])
        # While the server has a key, it is not sent again, except the last one as a check.
        assert len(told.keys) <= (blocks + 1 - max(0, told.known - 1)) * BLOCK_KEY_BYTES

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def ends(self, data: Any) -> None:
        """End a prompt, and tell the server if it knows the prompt."""
        prompt = data.draw(st.sampled_from(self.prompts))
        self.prompts.remove(prompt)
        if self.sent.forget(prompt.number):
            self.kept.forget((prompt.number,))

    @rule()
    def connects_anew(self) -> None:
        """Reconnect after a restart or a lost connection; both ends forget everything."""
        self.sent.clear()
        self.kept = KeptPrompts()

    @invariant()
    def is_bounded(self) -> None:
        """The server stays within its bounds, and keeps what the client believes it keeps."""
        assert len(self.kept._keys) <= PROMPTS_MAX
        assert self.kept._kept_bytes == sum(map(len, self.kept._keys.values()))
        assert self.kept._kept_bytes <= ALL_KEYS_MAX * BLOCK_KEY_BYTES
        assert {n: len(k) // BLOCK_KEY_BYTES for n, k in self.kept._keys.items()} == (
            self.sent._known
        )


TestBothEnds = BothEnds.TestCase


@settings(deadline=None)
@given(kept=st.integers(1, 6), known=st.integers(1, 8), other=st.integers(0, 8))
def test_keys_that_do_not_continue_the_known_ones_are_refused(
    kept: int, known: int, other: int
) -> None:
    """Keys that do not continue the keys that the server has are refused."""
    server = KeptPrompts()
    ours = b"".join(key_of(1, position) for position in range(kept))
    server.keys_of(Match(1, ours, prompt=7))
    said = key_of(1, other)
    message = Match(2, said + key_of(1, known), prompt=7, known=known)
    if known <= kept and other == known - 1:
        assert server.keys_of(message) == ours[: known * BLOCK_KEY_BYTES] + key_of(1, known)
    else:
        with pytest.raises(ProtocolError, match="do not continue"):
            server.keys_of(message)


def test_a_prompt_that_nobody_named_is_not_known() -> None:
    """The server knows no prompt that was never sent, was forgotten, or has no number."""
    server = KeptPrompts()
    server.keys_of(Match(1, key_of(1, 0)))
    server.keys_of(Match(1, key_of(1, 0), prompt=5))
    server.forget((5, 6))
    for prompt in (0, 5):
        with pytest.raises(ProtocolError):
            server.keys_of(Match(2, key_of(1, 0), prompt=prompt, known=1))


@pytest.mark.parametrize("bound", ["PROMPTS_MAX", "PROMPTS_BYTES_MAX", "PROMPT_BYTES_MAX"])
def test_a_client_that_makes_the_server_keep_too_much_breaks_the_protocol(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may not exceed the bound on prompts, on all keys, or on one prompt's keys."""
    monkeypatch.setattr(prompts, bound, 3 if bound == "PROMPTS_MAX" else 3 * BLOCK_KEY_BYTES)
    server = KeptPrompts()
    for prompt in (1, 2, 3):
        server.keys_of(Match(1, key_of(prompt, 0), prompt=prompt))
    with pytest.raises(ProtocolError, match="too many"):
        server.keys_of(Match(1, key_of(4, 0) * 4, prompt=4))
