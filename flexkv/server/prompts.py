"""The keys of prompts, as client and server keep them, so that each key is sent once.

Both ends apply one rule. A message names a prompt, how many of its keys the server has already, and
the keys from the last of these on. If it carries keys after the known ones, they replace what the
server has there; otherwise nothing changes. So the client knows what the server has, and the server
drops nothing by itself: a client that keeps too much breaks the protocol. All keys are dropped when
the connection ends.

A key is a hash of everything before it. So if the last known key is the same at both ends, all keys
before it are, too, and a request never means other blocks than its client intends.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ConfigError
from flexkv.common.request import as_int64
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.server.wire import (
    PROMPT_BYTES_MAX,
    PROMPTS_BYTES_MAX,
    PROMPTS_MAX,
    Match,
    ProtocolError,
    Start,
)


class KeptPrompts:
    """The server's side: the keys of one connection's prompts."""

    def __init__(self) -> None:
        self._keys: dict[int, bytes] = {}
        self._kept_bytes = 0

    def keys_of(self, message: Match | Start) -> bytes:
        """Return all keys that a message stands for, and keep them if it names a prompt.

        Raises:
            ProtocolError: the keys do not continue those that are kept, or are too many to keep.
        """
        keys, prompt = message.keys, message.prompt
        if message.known:
            kept = self._keys.get(prompt, b"")
            end = message.known * BLOCK_KEY_BYTES
            if len(kept) < end or kept[end - BLOCK_KEY_BYTES : end] != keys[:BLOCK_KEY_BYTES]:
                raise ProtocolError(f"the keys of prompt {prompt} do not continue the known keys")
            if len(keys) == BLOCK_KEY_BYTES:
                return kept[:end]
            keys = b"".join((memoryview(kept)[: end - BLOCK_KEY_BYTES], keys))
        if prompt:
            self._keep(prompt, keys)
        return keys

    def _keep(self, prompt: int, keys: bytes) -> None:
        if len(keys) > PROMPT_BYTES_MAX:
            raise ProtocolError(
                f"too many bytes of keys of a prompt: {len(keys)}, at most {PROMPT_BYTES_MAX}"
            )
        self._kept_bytes += len(keys) - len(self._keys.get(prompt, b""))
        self._keys[prompt] = keys
        if len(self._keys) > PROMPTS_MAX or self._kept_bytes > PROMPTS_BYTES_MAX:
            raise ProtocolError(
                f"{len(self._keys)} prompts with {self._kept_bytes} bytes of keys are too many: at "
                f"most {PROMPTS_MAX} with {PROMPTS_BYTES_MAX} bytes are kept"
            )

    def forget(self, prompts: tuple[int, ...]) -> None:
        """Drop the keys of these prompts; ignore unknown ones."""
        for prompt in prompts:
            self._kept_bytes -= len(self._keys.pop(prompt, b""))


class Prompt:
    """A prompt's keys at a client: made as the prompt grows, and sent once.

    Attributes:
        number: the number by which the server knows the prompt.
        keys: the root, and the keys of the first blocks. Keys are only ever added.
    """

    __slots__ = ("keys", "number")

    def __init__(self, number: int, keys: bytes = b"") -> None:
        self.number, self.keys = number, bytearray(keys)

    @property
    def blocks(self) -> int:
        """Return how many blocks have keys."""
        return max(0, len(self.keys) // BLOCK_KEY_BYTES - 1)


class PromptPart(NamedTuple):
    """The first `blocks` blocks of a prompt."""

    prompt: Prompt
    blocks: int


class Sent(NamedTuple):
    """The part of a prompt's keys that has to be sent, in the fields of a `Match`.

    Attributes:
        outdated: numbers of prompts that the server must be told to forget first.
    """

    keys: bytes
    prompt: int
    known: int
    outdated: list[int]


class SentPrompts:
    """The client's side: how many keys of each prompt the server has.

    This is true as long as everything that `part_of` returns is sent, in order.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        """How many keys the server has, by the prompt's number, least recently used first."""
        self._known_bytes = 0

    def part_of(self, part: PromptPart) -> Sent:
        """Return what to send so that the server has these blocks' keys; record it as sent."""
        prompt, count = part.prompt, part.blocks + 1
        size = count * BLOCK_KEY_BYTES
        if size > PROMPT_BYTES_MAX:
            return Sent(bytes(prompt.keys[:size]), 0, 0, [])
        before = self._known.pop(prompt.number, 0)
        known = min(before, count)
        self._known[prompt.number] = max(before, count)
        self._known_bytes += (max(before, count) - before) * BLOCK_KEY_BYTES
        keys = bytes(prompt.keys[max(0, known - 1) * BLOCK_KEY_BYTES : size])
        return Sent(keys, prompt.number, known, self._outdated())

    def _outdated(self) -> list[int]:
        """Forget the least recently used prompts that exceed a limit; return their numbers."""
        outdated = []
        while len(self._known) > PROMPTS_MAX or self._known_bytes > PROMPTS_BYTES_MAX:
            oldest = next(iter(self._known))
            self.forget(oldest)
            outdated.append(oldest)
        return outdated

    def forget(self, number: int) -> bool:
        """Record that the server forgets a prompt; return whether it had any of its keys."""
        known = self._known.pop(number, 0)
        self._known_bytes -= known * BLOCK_KEY_BYTES
        return known > 0

    def clear(self) -> None:
        """Record that the server has no keys, because the connection has ended."""
        self._known.clear()
        self._known_bytes = 0


Keys: TypeAlias = bytes | PromptPart
"""All keys of a prompt, or a part of a prompt whose keys the server keeps."""


def blocks_of(keys: Keys) -> int:
    """Return how many keys these are, root included; an answer may not have more blocks."""
    return len(keys) // BLOCK_KEY_BYTES if isinstance(keys, bytes) else keys.blocks + 1


def check_keys(keys: bytes) -> None:
    """Check the keys that a caller passed.

    Raises:
        ConfigError: they are not a positive number of whole keys.
    """
    if not isinstance(keys, bytes) or not keys or len(keys) % BLOCK_KEY_BYTES:
        raise ConfigError("keys", kind_of(keys), "must be keys that `Client.keys` returned")


def integers(tokens: Any) -> Any:
    """Return token ids as a list or an array of int64.

    A list is returned as it is: converting it to an array would cost more than the hashing.

    Raises:
        ConfigError: they are not integers.
    """
    return tokens if type(tokens) is list else as_int64("token_ids", tokens)
