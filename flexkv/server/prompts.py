"""The keys of prompts, as client and server keep them, so that each key is sent once.

Both ends apply one rule: a message names a prompt, the number of its keys that the server has, and
the keys from the last of these on. If it brings keys behind the known ones, they replace what the
server has there; if it brings none, nothing changes. So the client knows what the server has, and
the server drops nothing by itself: a client that keeps too much breaks the protocol. All of it ends
with the connection.

A key is a hash of everything before it. So if the last known key is the same at both ends, all keys
before it are, and a request never means other blocks than its client does.
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
        """Return all keys that a message means, and keep them if it names a prompt.

        Raises:
            ProtocolError: the keys do not continue those that are kept, or are too many to keep.
        """
        keys, prompt = message.keys, message.prompt
        if message.known:
            kept = self._keys.get(prompt, b"")
            end = message.known * BLOCK_KEY_BYTES
            if len(kept) < end or kept[end - BLOCK_KEY_BYTES : end] != keys[:BLOCK_KEY_BYTES]:
                raise ProtocolError(f"the keys of prompt {prompt} do not continue the known ones")
            if len(keys) == BLOCK_KEY_BYTES:
                return kept[:end]
            keys = b"".join((memoryview(kept)[: end - BLOCK_KEY_BYTES], keys))
        if prompt:
            self._keep(prompt, keys)
        return keys

    def _keep(self, prompt: int, keys: bytes) -> None:
        if len(keys) > PROMPT_BYTES_MAX:
            raise ProtocolError(f"{len(keys)} bytes of keys of one prompt are too many to keep")
        self._kept_bytes += len(keys) - len(self._keys.get(prompt, b""))
        self._keys[prompt] = keys
        if len(self._keys) > PROMPTS_MAX or self._kept_bytes > PROMPTS_BYTES_MAX:
            raise ProtocolError(
                f"{len(self._keys)} prompts with {self._kept_bytes} bytes of keys are too many"
            )

    def forget(self, prompts: tuple[int, ...]) -> None:
        """Drop the keys of these prompts; unknown ones are ignored."""
        for prompt in prompts:
            self._kept_bytes -= len(self._keys.pop(prompt, b""))


class Prompt:
    """A prompt's keys at a client: made as the prompt grows, and sent once.

    Attributes:
        number: names it to the server.
        keys: the root, and the keys of its first blocks. They only become more.
    """

    __slots__ = ("keys", "number")

    def __init__(self, number: int, keys: bytes = b"") -> None:
        self.number, self.keys = number, bytearray(keys)

    @property
    def blocks(self) -> int:
        """Return how many blocks have keys."""
        return max(0, len(self.keys) // BLOCK_KEY_BYTES - 1)


class PromptPart(NamedTuple):
    """The first blocks of a prompt, which a client asks for."""

    prompt: Prompt
    blocks: int


class Sent(NamedTuple):
    """What has to be sent of a prompt's keys: as in `Match`.

    Attributes:
        outdated: prompts that the server has to forget first.
    """

    keys: bytes
    prompt: int
    known: int
    outdated: list[int]


class SentPrompts:
    """The client's side: how many keys of each prompt the server has.

    It is right as long as everything that `part_of` returns is sent, in order.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        """In the order of their last use."""
        self._known_bytes = 0

    def part_of(self, part: PromptPart) -> Sent:
        """Return what to send so that the server has the keys of these blocks, and note it."""
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
        """Forget the prompts that were not used for longest, if there is no room for all."""
        outdated = []
        while len(self._known) > PROMPTS_MAX or self._known_bytes > PROMPTS_BYTES_MAX:
            oldest = next(iter(self._known))
            self.forget(oldest)
            outdated.append(oldest)
        return outdated

    def forget(self, number: int) -> bool:
        """Note that the server forgets a prompt; return whether it has it."""
        known = self._known.pop(number, 0)
        self._known_bytes -= known * BLOCK_KEY_BYTES
        return known > 0

    def clear(self) -> None:
        """Note that the server has nothing: another one, or another connection."""
        self._known.clear()
        self._known_bytes = 0


Keys: TypeAlias = bytes | PromptPart
"""All keys of a prompt, or a part of a prompt whose keys the server keeps."""


def blocks_of(keys: Keys) -> int:
    """Return how many keys a message stands for: an answer has no more blocks."""
    return len(keys) // BLOCK_KEY_BYTES if isinstance(keys, bytes) else keys.blocks + 1


def check_keys(keys: bytes) -> None:
    """Check the keys of a prompt that a caller gives.

    Raises:
        ConfigError: they are not whole keys.
    """
    if not isinstance(keys, bytes) or not keys or len(keys) % BLOCK_KEY_BYTES:
        raise ConfigError("keys", kind_of(keys), "must be what `Client.keys` gives")


def integers(tokens: Any) -> Any:
    """Return token ids as a list or an array of int64.

    A list is read as it is: an array of it would cost more than the hashing.

    Raises:
        ConfigError: they are not integers.
    """
    return tokens if type(tokens) is list else as_int64("token_ids", tokens)
