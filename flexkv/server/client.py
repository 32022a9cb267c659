"""The client of an engine's scheduler at a server: synchronous, for one thread.

`ask` sends a match, and `answer` returns its result, which takes some tens of microseconds. `start`
only queues a request, `flush` sends what is queued, and `poll` does that too and returns the
requests that have ended, without waiting. A lost server costs hits, never a request: matches find
nothing, requests under way are reported as failed, and the client reconnects by itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from secrets import randbits
from typing import Any

from flexkv.common.arguments import member
from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import ClosedError, ConfigError
from flexkv.common.request import LeafBlocks, Operation, as_int64
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds
from flexkv.index.keys import KeyChain, Namespace, block_identity
from flexkv.observe.logs import get_logger
from flexkv.process import forks
from flexkv.process.forks import HomeProcess
from flexkv.server.awaited import Awaited
from flexkv.server.changes import Changes
from flexkv.server.frames import FrameSocket
from flexkv.server.handshake import Connected
from flexkv.server.leaves import leaf_ids
from flexkv.server.prompts import (
    Keys,
    Prompt,
    PromptPart,
    Sent,
    SentPrompts,
    blocks_of,
    check_keys,
    integers,
)
from flexkv.server.reconnect import Reconnects
from flexkv.server.wire import (
    PROTOCOL_VERSION,
    Cancel,
    Changed,
    Done,
    Forget,
    FromServer,
    Hello,
    Match,
    Matched,
    Message,
    ProtocolError,
    Release,
    Start,
    State,
    Welcome,
    parts_of,
    why_unsent,
)

log = get_logger(__name__)

HANG_S = 60.0
"""With requests under way, a server that sends nothing for this long counts as lost."""
RECEIVE_S_MAX = 0.02
"""How long one call may read, so that a server that keeps sending does not delay a step."""
UNSENT_BYTES_MAX = 16 << 20


class Client:
    """One instance's requests to a server.

    Attributes:
        is_ready: whether all devices of the instance are connected; else no block can be moved.
        num_blocks: how many blocks each of its devices has.
        generation: the generation of the server's cache, as last reported.
        key_chain: derives the keys of prompts, for the element order of the devices' blocks.
        epoch: identifies the state of the devices: see `State`.
        welcome: how the server answered the last connection: its tiers, its host memory.
    """

    def __init__(
        self, settings: Settings, model: ModelConfig, instance: int = 0, watches: bool = False
    ) -> None:
        """Create a client, which connects at the first call that needs the server.

        Args:
            settings: the server's address, and how long it may take to answer. Block size and
                `key_secret` must be the server's.
            model: the server's model.
            instance: the number of this engine among those that share the server.
            watches: whether to collect changes of the index for `changes`.
        """
        self._address, self._instance, self._watches = settings.server_recv_port, instance, watches
        self._answer_s = settings.server_answer_ms / 1e3
        self._changes = Changes()
        cache = settings.cache_config
        spaces = model.spaces(cache.tokens_per_block)
        self._space = spaces[0]
        self._secret = cache.key_secret.get_secret_value()
        self.key_chain = KeyChain(self._space, self._secret)
        self.order = ""
        self._socket: FrameSocket | None = None
        self._home: HomeProcess | None = None
        forks.on_fork(self._let_go_in_child)
        self._prompts, self._next_prompt = SentPrompts(), 0
        self._awaited = Awaited()
        self._is_behind = False
        facts = block_identity(spaces, self._secret)
        self._reconnects = Reconnects(
            self._address, self._answer_s,
            lambda: Hello(PROTOCOL_VERSION, "client", os.getpid(), facts, instance, watches=watches)
        )  # fmt: skip
        # A random start, so that no number of an earlier scheduler can be taken for one of ours.
        self._next = randbits(31) << 32
        self.is_ready, self.num_blocks, self.epoch, self.generation = False, 0, 0, 0
        self.welcome = Welcome(PROTOCOL_VERSION, 0)
        self._heard_s = 0.0

    # -- keys -----------------------------------------------------------------------------------

    def keys(self, tokens: Any, namespace: Namespace = None) -> bytes:
        """Return the root, and the key of every whole block of a prompt: 16 bytes each.

        They depend on the element order of the devices' blocks, which is known once `is_ready`.
        """
        return self.key_chain.keys(integers(tokens), namespace)

    def extend(self, prompt: Prompt, tokens: Any) -> None:
        """Append the keys of `tokens` to a prompt; the tokens follow those of its whole blocks.

        The prompt's namespace must not have extra keys.
        """
        self.key_chain.extend_in_place(prompt.keys, integers(tokens))

    def new_prompt(self) -> Prompt:
        """Return a prompt without keys; the server keeps those that are sent later."""
        self._next_prompt += 1
        return Prompt(self._next_prompt)

    def forget(self, prompt: Prompt) -> None:
        """Have the server drop the keys of a prompt."""
        if self._prompts.forget(prompt.number):
            self._send(Forget((prompt.number,)))

    # -- requests -------------------------------------------------------------------------------

    def match(
        self, keys: Keys, first: int = 0, hold: bool = False, tell: bool = False, drop: int = 0
    ) -> Matched:
        """Return how many blocks of a prompt are resident; none if the server does not answer.

        The result's `by_tier` counts the blocks from `first` on. With `hold`, the blocks are kept
        from eviction until `start` or `release` gets the match's number. With `tell`, `changes`
        also returns where each block is. `drop` is how many blocks behind those in the result must
        be resident as well: see `KVGroups.drop`.
        """
        return self.result(self.ask(keys, first, hold, tell, drop))

    def result(self, number: int) -> Matched:
        """Wait for the result of a match, and return it."""
        self.flush(self._answer_s)
        while (matched := self.answer(number)) is None:
            self._receive(self._answer_s)
        return matched

    def ask(
        self, keys: Keys, first: int = 0, hold: bool = False, tell: bool = False, drop: int = 0,
        **far: bool,
    ) -> int:  # fmt: skip
        """Send a match (see `match`); return its number for `answer`, `release`.

        For a part of a prompt, only the keys that the server lacks are sent. `far` takes `apart` or
        `with_far`, which count what lies far: see `Match`.
        """
        part = self._part_of(keys)
        message = Match(self.number(), part.keys, first, hold, tell, part.prompt, part.known,
                        drop=drop, **far)  # fmt: skip
        return self._ask(message, blocks_of(keys))

    def _ask(self, message: Match, blocks: int) -> int:
        if self._send(message):
            self._awaited.ask(message.number, blocks)
            self.flush()
        return message.number

    def find(self, keys: bytes, first: int, hold: bool) -> Matched:
        """Do what `match` does for the blocks from `first` on; others need not be resident."""
        match = Match(self.number(), keys, first, hold, from_first=True)
        return self.result(self._ask(match, blocks_of(keys)))

    def answer(self, number: int, wait_s: float = 0.0) -> Matched | None:
        """Return the result of a match, once; None if it does not arrive within `wait_s`.

        This spins, because a thread that sleeps or yields its CPU may get it back a millisecond
        later. A server that has neither answered nor read more of what was sent to it for
        `server_answer_ms` counts as lost; then the result has no blocks.
        """
        self._check_process()
        until_s = time.monotonic() + wait_s
        while self._awaited.asked_s(number) is not None:
            self.flush()
            # Read the clock first: after a long wait for a CPU, the answer may have arrived.
            now_s, heard = time.monotonic(), self._receive_all()
            asked_s = self._awaited.asked_s(number)
            if asked_s is not None and now_s > asked_s + self._answer_s:
                self._lost(f"no answer within {self._answer_s} s")
            elif now_s >= until_s and not heard:
                return None
        return self._awaited.answer(number) or Matched(number, 0, {})

    def release(self, numbers: Sequence[int]) -> None:
        """End the holds of matches, and give up those that are not answered yet."""
        self._check_process()
        for number in numbers:
            self._awaited.release(number)
        for part in parts_of(numbers):
            if self._socket is not None:
                self._send(Release(part))

    def start(
        self, operation: Operation, keys: Keys, first: int, device_ids: BlockIds | None,
        when_ready: bool = False,
    ) -> int:  # fmt: skip
        """Begin a request for the blocks from `first` on, and return its number.

        Args:
            operation: get, put or prefetch.
            keys: root and keys of the prompt, up to the last block of the request.
            first: the first block of the request.
            device_ids: int64, one for each block; None for a prefetch.
            when_ready: whether it waits until the agent of every rank has reported it as `ready`.
        """
        member("operation", operation, Operation)
        return self._start(operation, keys, first, device_ids, when_ready=when_ready)

    def prefetch(self, keys: Keys, first: int, held: int = 0, drop: int = 0) -> int:
        """Begin to bring blocks to host memory; the hold of the match `held` ends then."""
        return self._start(Operation.PREFETCH, keys, first, None, held=held, drop=drop)

    def get(
        self, keys: Keys, first: int, device_ids: BlockIds, held: int, when_ready: bool,
        leaves: Sequence[LeafBlocks] = (),
    ) -> int:  # fmt: skip
        """Begin a get; arguments as for `start` and `ask`.

        If the model has several KV groups, `leaves` are the device blocks of all leaves that the
        prefix needs from `first` on, by ascending group. Either all blocks of all groups are
        loaded, or none is.
        """
        more = {"when_ready": when_ready, "held": held, "leaves": leaf_ids(leaves)}
        return self._start(Operation.GET, keys, first, device_ids, **more)

    def get_by_layer(
        self, keys: Keys, first: int, device_ids: BlockIds, held: int, when_ready: bool
    ) -> int:
        """Begin a get that is copied layer by layer: see `Agent.wait_for_layer`."""
        more = {"when_ready": when_ready, "held": held, "by_layer": True}
        return self._start(Operation.GET, keys, first, device_ids, **more)

    def put(
        self, keys: Keys, first: int, device_ids: BlockIds, generation: int,
        by_layer: bool = False, leaves: Sequence[LeafBlocks] = (),
    ) -> int:  # fmt: skip
        """Begin a put that waits until the agent of every rank has reported it as `ready`.

        Args:
            keys: of the prompt up to the last block to store.
            first: the first block to store.
            device_ids: int64, one for each block to store.
            generation: the client's `generation` when computing the blocks began. If the cache
                was cleared since then, nothing is stored, and the `Done` has `is_stale`.
            by_layer: whether each layer is copied once written: see `Agent.layer_written`.
            leaves: the device blocks of leaves to store, by ascending group, at any positions of
                `keys`; those whose parent is not stored are left out.
        """
        more: dict[str, Any] = {"when_ready": True, "generation": generation, "by_layer": by_layer}
        more["leaves"] = leaf_ids(leaves)
        return self._start(Operation.PUT, keys, first, device_ids, **more)

    def _start(
        self, operation: Operation, keys: Keys, first: int, ids: BlockIds | None, **more: Any
    ) -> int:
        blob = b"" if ids is None else as_int64("device_ids", ids).tobytes()
        part = self._part_of(keys)
        return self.begin(Start(
            self.number(), operation.label, part.keys, first, blob, self.epoch,
            prompt=part.prompt, known=part.known, **more,
        ))  # fmt: skip

    def begin(self, start: Start) -> int:
        """Begin a request, and return its number."""
        awaited, number = self._awaited, start.number
        if not awaited.requests:
            self._heard_s = time.monotonic()
        blocks = max(start.known - 1, 0) + len(start.keys) // BLOCK_KEY_BYTES
        awaited.begin(number, blocks)
        if not self._send(start) and number in awaited.requests:
            awaited.fail([number], why_unsent(blocks if self._socket else 0))
        return number

    def cancel(self, numbers: Sequence[int]) -> None:
        """Cancel requests; `poll` returns their ends all the same."""
        self._check_process()
        for part in parts_of([each for each in numbers if each in self._awaited.requests]):
            self._send(Cancel(part))

    def poll(self) -> list[Done]:
        """Return the requests that ended since the last call, each exactly once. Never waits."""
        if self._connected():
            self.flush()
            now_s = time.monotonic()
            self._receive_all()
            if self._awaited.requests and now_s > self._heard_s + HANG_S:
                self._lost(f"it sent nothing for {HANG_S} s")
        return self._awaited.ended()

    def changes(self) -> list[Changed]:
        """Return the reported changes of which blocks are resident, each once."""
        self._check_process()
        return self._changes.collect()

    def give_up(self, reason: str) -> None:
        """Disconnect for a while, so that the server discards what puts under way have read."""
        self._check_process()
        if self._socket is not None:
            self._lost(reason)

    def close(self) -> None:
        """Disconnect; the server cancels the requests under way. Idempotent."""
        self._check_process()
        self._reconnects.stop()
        self._drop()

    # -- inside ---------------------------------------------------------------------------------

    def _check_process(self) -> None:
        """Check that this is no forked child: the connection belongs to the parent.

        Raises:
            ClosedError: it is a forked child.
        """
        if self._home is not None:
            self._home.check()

    def _let_go_in_child(self) -> None:
        if self._socket is not None:
            self._socket.let_go_in_child()

    def number(self) -> int:
        """Return the number of a new match or request."""
        self._next += 1
        return self._next

    def connect(self) -> None:
        """Connect, unless there is a connection.

        Raises:
            OSError: nobody listens at the address, or nobody answers in time.
            ConfigError: the server refuses us, or is another user's.
            ClosedError: the server is closing, this client is closed, or this is a forked child.
        """
        self._check_process()
        if self._socket is None:
            self._take_connection(self._reconnects.now())

    def _connected(self) -> bool:
        """Connect if an attempt is due; return whether there is a connection."""
        self._check_process()
        if self._socket is None and (connected := self._reconnects.if_due()) is not None:
            self._take_connection(connected)
        return self._socket is not None

    def _take_connection(self, connected: Connected) -> None:
        self._socket, self.welcome = FrameSocket(connected.socket), connected.welcome
        self._home = HomeProcess("the connection to the server")
        log.info("connected", path=self._address, instance=self._instance)
        self._heard_s = time.monotonic()
        self._receive(self._answer_s)  # the server's first message is a `State`

    @property
    def connection(self) -> FrameSocket | None:
        """Return the connection: `poll` reads from it."""
        return self._socket

    def _send(self, message: Message) -> bool:
        """Queue a message for `flush`, and return whether it was queued.

        It is not without a connection, or if it is longer than the server accepts.
        """
        if not self._connected():
            return False
        assert self._socket is not None
        try:
            self._socket.queue(message)
        except ConfigError as error:
            log.warning("message_not_sent", reason=str(error))
            return False
        return True

    def _part_of(self, keys: Keys) -> Sent:
        """Return the keys to send, and record that the server has them: the caller must send them.

        They are recorded only while connected; a message with them is never too long to send.
        """
        if not isinstance(keys, PromptPart):
            check_keys(keys)
            return Sent(keys, 0, 0, [])
        if not self._connected():
            return Sent(bytes(keys.prompt.keys[: (keys.blocks + 1) * BLOCK_KEY_BYTES]), 0, 0, [])
        part = self._prompts.part_of(keys)
        for each in parts_of(part.outdated):
            self._send(Forget(each))
        return part

    def flush(self, wait_s: float = 0.0) -> None:
        """Send the queued messages: one system call for a step of a scheduler.

        What the server does not take within `wait_s` is sent with the next call. A server that
        leaves more than `UNSENT_BYTES_MAX` unread counts as lost.
        """
        self._check_process()
        line = self._socket
        if line is None or not line.unsent:
            return
        try:
            has_taken = line.flush(wait_s)
        except OSError as error:
            self._lost(str(error))
            return
        if has_taken and self._is_behind:  # it may have got matches late: restart their timeouts
            self._is_behind = False
            self._awaited.restart()
        if line.unsent:
            self._is_behind = True
            if len(line.unsent) > UNSENT_BYTES_MAX:
                self._lost(f"it left {len(line.unsent)} bytes unread")

    def _receive(self, wait_s: float) -> bool:
        """Process what arrives within `wait_s`; return whether something valid arrived."""
        if self._socket is None:
            return False
        try:
            messages = self._socket.receive(wait_s)
            if messages is None:
                return False
            self._heard_s = time.monotonic()
            for message in messages:
                self._take(message)
        except ProtocolError as error:
            self._lost(f"it sent an invalid message: {error}")
        except (OSError, ClosedError) as error:
            self._lost(str(error))
        return self._socket is not None

    def _receive_all(self) -> bool:
        """Process what has arrived, for a bounded time; return whether any of it was valid."""
        until_s, heard = time.monotonic() + RECEIVE_S_MAX, False
        while self._receive(0.0):
            heard = True
            if self._socket is None or self._socket.is_drained or time.monotonic() >= until_s:
                break
        return heard

    def _take(self, message: FromServer) -> None:
        match message:
            case Matched():
                self._awaited.take_matched(message)
            case Changed():
                if not self._watches:
                    raise ProtocolError("the server sent changes that nobody asked for")
                self._changes.add(message)
            case Done():
                self._awaited.take_done(message)
            case State():
                self.is_ready, self.num_blocks = message.ready, message.num_blocks
                self.epoch, self.generation = message.epoch, message.generation
                if message.ready and message.order != self.order:
                    self.order = message.order
                    self.key_chain = KeyChain(self._space, self._secret, message.order)
            case _:
                raise ProtocolError(f"a server may not send {type(message).__name__} to a client")

    def _lost(self, reason: str) -> None:
        failing = len(self._awaited.requests)
        log.warning("server_lost", path=self._address, reason=reason, failed=failing)
        self._reconnects.back_off()
        self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            if self._watches:
                self._changes.lose()
        self._socket, self.is_ready, self._is_behind = None, False, False
        self._prompts.clear()
        self._awaited.disconnected(ClosedError("disconnected from the server"))
