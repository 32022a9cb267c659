"""An engine's scheduler at a server: synchronous, in one thread, and never waiting for I/O.

`ask` sends a question, and `answer` gives what comes of it, some tens of microseconds later;
`start` only queues, `flush` sends what is queued, and `poll` does so too and gives what has ended
meanwhile. A server that is gone costs hits, never a request: matches find nothing, what was under
way is told as failed, and the client connects again by itself.
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
from flexkv.common.request import KVResponseStatus, Operation, as_int64
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds
from flexkv.index.keys import KeyChain, Namespace, block_identity
from flexkv.observe.logs import get_logger
from flexkv.process import forks
from flexkv.process.forks import HomeProcess
from flexkv.server.frames import FrameSocket
from flexkv.server.handshake import connect
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
    parts_of,
)

log = get_logger(__name__)

RETRY_S, RETRY_S_MAX = 0.5, 30.0
"""Between two attempts to connect; doubled each time while something is there and fails us."""
HANG_S = 60.0
"""With requests under way, a server that says nothing for so long is as good as gone."""
POLL_S_MAX = 0.02
"""How long one `poll` may read, so that a server that never stops talking delays no step."""
CHANGES_MAX = 1 << 20
"""How many changes wait for a call of `changes`; beyond that it reports that some are lost."""
UNSENT_BYTES_MAX = 16 << 20


class Client:
    """One instance's requests to a server.

    Attributes:
        is_ready: whether all devices of the instance are connected; else nothing can be moved.
        num_blocks: how many blocks each of its devices has.
        generation: of the server's cache, as last reported. It grows with each clear.
    """

    def __init__(
        self, settings: Settings, model: ModelConfig, instance: int = 0, watches: bool = False
    ) -> None:
        """Take where the server is; nothing is connected before it is needed.

        Args:
            settings: of it, where the server is and how long it may take to answer; and, as the
                server's, block size and `key_secret`.
            model: as the server's.
            instance: which of the engines that share the server.
            watches: whether `changes` are wanted.
        """
        self._address, self._instance, self._watches = settings.server_recv_port, instance, watches
        self._answer_s = settings.server_answer_ms / 1e3
        self._changes: list[Changed] = []
        self._changes_kept = 0
        cache = settings.cache_config
        self._model, self._tokens_per_block = model, cache.tokens_per_block
        self._secret = cache.key_secret.get_secret_value()
        self._keys = KeyChain(model, self._tokens_per_block, self._secret)
        self._order = ""
        self._socket: FrameSocket | None = None
        self._home: HomeProcess | None = None
        forks.on_fork(self._let_go_in_child)
        self._prompts, self._next_prompt = SentPrompts(), 0
        self._asked: dict[int, float] = {}
        """Since when the server has had the time to answer."""
        self._blocks: dict[int, int] = {}
        """How many blocks each match and request under way names: an answer has no more."""
        self._is_behind = False
        self._matched: dict[int, Matched] = {}
        self._ended: list[Done] = []
        self._under_way: set[int] = set()
        self._retry_s = 0.0
        # Numbers of a scheduler that was here before mean nothing of ours.
        self._next = randbits(31) << 32
        self.is_ready, self.num_blocks, self._epoch = False, 0, 0
        self.generation = 0
        self._wait_s, self._heard_s = RETRY_S, 0.0

    # -- keys -----------------------------------------------------------------------------------

    def keys(self, tokens: Any, namespace: Namespace = None) -> bytes:
        """Give the root, and the key of every whole block of a prompt: 16 bytes each.

        They hang on the order of the devices' blocks, which is known when `is_ready`.
        """
        return self._keys.keys(integers(tokens), namespace)

    def extend(self, prompt: Prompt, tokens: Any) -> None:
        """Add the keys of `tokens` to a prompt; the tokens follow those of its whole blocks.

        The prompt's namespace may have no extra keys.
        """
        self._keys.extend_in_place(prompt.keys, integers(tokens))

    def new_prompt(self) -> Prompt:
        """Return a prompt without keys; the server keeps those that are sent later."""
        self._next_prompt += 1
        return Prompt(self._next_prompt)

    def forget(self, prompt: Prompt) -> None:
        """Let the server drop the keys of a prompt."""
        if self._prompts.forget(prompt.number):
            self._send(Forget((prompt.number,)))

    # -- requests -------------------------------------------------------------------------------

    def match(self, keys: Keys, first: int = 0, hold: bool = False, tell: bool = False) -> Matched:
        """Give how many blocks of a prompt are resident; none when the server does not answer.

        Of those from `first` on it tells where they are. With `hold` they are kept from eviction,
        until `start` or `release` gets its number; with `tell` where they are comes by `changes`.
        """
        number = self.ask(keys, first, hold, tell)
        self.flush(self._answer_s)
        while (matched := self.answer(number)) is None:
            self._receive(self._answer_s)
        return matched

    def ask(self, keys: Keys, first: int = 0, hold: bool = False, tell: bool = False) -> int:
        """Ask as `match` does, and return the number of the question for `answer`, or `release`.

        For a part of a prompt, only the keys that the server lacks are sent.
        """
        number = self._number()
        part = self._part_of(keys)
        message = Match(number, part.keys, first, hold, tell, part.prompt, part.known)
        if self._send(message):
            self._asked[number] = time.monotonic()
            self._blocks[number] = blocks_of(keys)
            self.flush()
        return number

    def answer(self, number: int, wait_s: float = 0.0) -> Matched | None:
        """Give what came of a question, once; None if that is not known within `wait_s`.

        It waits in a loop, as for a lock that is held briefly: a thread that sleeps, or yields its
        CPU, may get it back a millisecond later. A server that has neither answered nor read more
        of what it is sent for `server_answer_ms` is as good as gone.
        """
        self._check_process()
        until_s = time.monotonic() + wait_s
        while number in self._asked:
            self.flush()
            heard, now_s = self._receive(0.0), time.monotonic()
            if now_s > self._asked.get(number, now_s) + self._answer_s:
                self._lost(f"it did not answer within {self._answer_s} s")
            elif now_s >= until_s and not heard:
                return None
        return self._matched.pop(number, None) or Matched(number, 0, {})

    def release(self, numbers: Sequence[int]) -> None:
        """Let go of what matches hold, or of questions."""
        self._check_process()
        for number in numbers:
            self._asked.pop(number, None)
            self._matched.pop(number, None)
            self._blocks.pop(number, None)
        for part in parts_of(numbers):
            if self._socket is not None:
                self._send(Release(part))

    def start(
        self,
        operation: Operation,
        keys: bytes,
        first: int,
        device_ids: BlockIds | None,
        when_ready: bool = False,
        held: int = 0,
    ) -> int:
        """Begin a request of the blocks from `first` on, and give its number.

        Args:
            operation: get, put or prefetch.
            keys: of the prompt up to the last block that is meant.
            first: of the blocks.
            device_ids: int64, one for each; None for a prefetch.
            when_ready: a put waits until every rank's agent has told that it is `ready`.
            held: the match whose hold ends when this request is planned.
        """
        member("operation", operation, Operation)
        ids = b"" if device_ids is None else as_int64("device_ids", device_ids).tobytes()
        number = self._number()
        start = Start(number, operation.label, keys, first, ids, self._epoch, when_ready, held)
        return self._begin(start, blocks_of(keys))

    def get(self, keys: Keys, first: int, device_ids: BlockIds, held: int, when_ready: bool) -> int:
        """Begin a get; arguments as for `start` and `ask`."""
        part, ids = self._part_of(keys), as_int64("device_ids", device_ids).tobytes()
        start = Start(
            self._number(), Operation.GET.label, part.keys, first, ids, self._epoch, when_ready,
            held, prompt=part.prompt, known=part.known,
        )  # fmt: skip
        return self._begin(start, blocks_of(keys))

    def put(self, keys: Keys, first: int, device_ids: BlockIds, generation: int) -> int:
        """Begin a put that waits until the agent of every rank says that it is `ready`.

        Args:
            keys: of the prompt up to the last block that is put.
            first: the first block that is put.
            device_ids: int64, one for each block that is put.
            generation: the client's `generation` when the blocks began to be computed. If the
                cache was cleared since then, nothing is stored, and the `Done` has `is_stale`.
        """
        part, ids = self._part_of(keys), as_int64("device_ids", device_ids).tobytes()
        start = Start(
            self._number(), Operation.PUT.label, part.keys, first, ids, self._epoch, True,
            generation=generation, prompt=part.prompt, known=part.known,
        )  # fmt: skip
        return self._begin(start, blocks_of(keys))

    def _begin(self, start: Start, blocks: int) -> int:
        if not self._under_way:
            self._heard_s = time.monotonic()
        self._under_way.add(start.number)
        self._blocks[start.number] = blocks
        if not self._send(start) and start.number in self._under_way:
            self._fail(start.number, "there is no server")
        return start.number

    def cancel(self, numbers: Sequence[int]) -> None:
        """Give requests up; `poll` gives their ends all the same."""
        self._check_process()
        for part in parts_of([number for number in numbers if number in self._under_way]):
            self._send(Cancel(part))

    def poll(self) -> list[Done]:
        """Give the requests that ended since the last call, each exactly once. Never waits."""
        if self._connected():
            self.flush()
            until_s = time.monotonic() + POLL_S_MAX
            while self._receive(0.0) and time.monotonic() < until_s:
                if self._socket is None or self._socket.is_drained:
                    break
            if self._under_way and time.monotonic() > self._heard_s + HANG_S:
                self._lost(f"it said nothing for {HANG_S} s")
        ended, self._ended = self._ended, []
        return ended

    def changes(self) -> list[Changed]:
        """Give what became resident or is so no more, as far as it has been told, each once."""
        self._check_process()
        changes, self._changes, self._changes_kept = self._changes, [], 0
        return changes

    def give_up(self, reason: str) -> None:
        """Disconnect for a while: what puts under way have read will not be believed."""
        self._check_process()
        if self._socket is not None:
            self._lost(reason)

    def close(self) -> None:
        """Disconnect; the server cancels what is under way. Idempotent."""
        self._check_process()
        self._retry_s = float("inf")
        self._drop()

    # -- inside ---------------------------------------------------------------------------------

    def _check_process(self) -> None:
        """Refuse a call in a forked child: the connection is its parent's.

        Raises:
            ClosedError: this is one.
        """
        if self._home is not None:
            self._home.check()

    def _let_go_in_child(self) -> None:
        if self._socket is not None:
            self._socket.let_go_in_child()

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _connected(self) -> bool:
        """Connect if that is due; return whether there is a connection."""
        self._check_process()
        if self._socket is not None:
            return True
        if time.monotonic() < self._retry_s:
            return False
        facts = block_identity(self._model, self._tokens_per_block, self._secret)
        hello = Hello(
            PROTOCOL_VERSION, "client", os.getpid(), facts, self._instance, watches=self._watches
        )
        try:
            self._socket = FrameSocket(connect(self._address, hello, self._answer_s).socket)
            self._home = HomeProcess("the connection to the server")
        except ConfigError as error:
            log.warning("refused_by_server", path=self._address, reason=str(error))
        except (ConnectionRefusedError, FileNotFoundError) as error:
            # It may be starting. To ask again costs microseconds.
            log.debug("no_server", path=self._address, reason=str(error))
            self._retry_s = time.monotonic() + RETRY_S
            return False
        except (OSError, ClosedError) as error:
            log.warning("no_server", path=self._address, reason=str(error))
        else:
            log.info("connected", path=self._address, instance=self._instance)
            self._wait_s, self._heard_s = RETRY_S, time.monotonic()
            self._receive(self._answer_s)  # the server tells at once whether the devices are there
            return self._socket is not None
        self._back_off()
        return False

    def _back_off(self) -> None:
        """Leave the server alone for a while: longer, the longer it does not answer."""
        self._retry_s = time.monotonic() + self._wait_s
        self._wait_s = min(2 * self._wait_s, RETRY_S_MAX)

    def _send(self, message: Message) -> bool:
        """Queue a message for `flush`, and return whether it can be sent.

        It cannot be sent without a connection, or if it is longer than the server accepts.
        """
        if not self._connected():
            return False
        assert self._socket is not None
        try:
            self._socket.queue(message)
        except ConfigError as error:
            log.warning("not_asked", reason=str(error))
            return False
        return True

    def _part_of(self, keys: Keys) -> Sent:
        """Return the keys to send, and note that the server has them: so they must be sent.

        They are noted only over a connection, and a message with them is never too long to send.
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
        """Send what was asked for since the last call: one system call for a step of a scheduler.

        What the server does not take within `wait_s` is sent with the next call. A server that is
        `UNSENT_BYTES_MAX` behind is as good as gone.
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
        if has_taken:
            self._reads_on()
        if line.unsent:
            self._is_behind = True
            if len(line.unsent) > UNSENT_BYTES_MAX:
                self._lost(f"it has {len(line.unsent)} bytes to read")

    def _reads_on(self) -> None:
        """Hear that the server has taken more: if it was behind, so were we in sending the rest."""
        if self._is_behind:
            self._is_behind, self._asked = False, dict.fromkeys(self._asked, time.monotonic())

    def _receive(self, wait_s: float) -> bool:
        """Take what has come, after so long at most; tell whether anything has."""
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
            self._lost(f"it is not understood: {error}")
        except (OSError, ClosedError) as error:
            self._lost(str(error))
        return self._socket is not None

    def _take(self, message: FromServer) -> None:
        match message:
            case Matched():
                if self._asked.pop(message.number, None) is not None:
                    self._check_blocks(message.number, message.blocks, *message.by_tier.values())
                    self._matched[message.number] = message
            case Changed():
                self._take_changes(message)
            case Done():
                if message.number in self._under_way:
                    if message.status not in _STATUSES:
                        raise ProtocolError(f"no request ends as {message.status!r}")
                    self._check_blocks(message.number, message.moved)
                    self._under_way.discard(message.number)
                    self._ended.append(message)
            case State():
                self.is_ready, self.num_blocks = message.ready, message.num_blocks
                self._epoch, self.generation = message.epoch, message.generation
                if message.ready and message.order != self._order:
                    self._order = message.order
                    self._keys = KeyChain(
                        self._model, self._tokens_per_block, self._secret, message.order
                    )
            case _:
                raise ProtocolError(f"a client is not sent {type(message).__name__}")

    def _check_blocks(self, number: int, *blocks: int) -> None:
        """Check that an answer has no more blocks than were asked for.

        Raises:
            ProtocolError: it has more.
        """
        asked = self._blocks.pop(number, 0)
        if any(count > asked for count in blocks):
            raise ProtocolError(f"{max(blocks)} blocks of {asked}")

    def _take_changes(self, changed: Changed) -> None:
        if not self._watches:
            raise ProtocolError("changes that nobody asked for")
        self._changes_kept += len(changed.changes)
        if self._changes_kept > CHANGES_MAX:
            self._changes, self._changes_kept = [], 0
            changed = Changed((), lost=True)
        self._changes.append(changed)

    def _lost(self, reason: str) -> None:
        log.warning("server_lost", path=self._address, reason=reason, failed=len(self._under_way))
        self._back_off()
        self._drop()

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            if self._watches:
                self._changes.append(Changed((), lost=True))
        self._socket, self.is_ready, self._is_behind = None, False, False
        self._prompts.clear()
        self._asked.clear()
        self._matched.clear()
        self._blocks.clear()
        for number in list(self._under_way):
            self._fail(number, "the server is gone")

    def _fail(self, number: int, why: str) -> None:
        self._under_way.discard(number)
        self._ended.append(Done(number, "failed", 0, why))


_STATUSES = frozenset(status.value for status in KVResponseStatus)
