"""A scheduler's side at a real server, with a far tier that the test speeds.

The scheduler's side is the real one, and so is the server, in a thread of this process. What others
hold arrives when the test lets it pass, and the time that a prompt has waited is the test's, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.server.wire import Copied, Copy, Message, Ready
from flexkv.testing.far_server import FarServer
from tests.system.conftest import MODEL, PER_BLOCK
from tests.system.serving import Peer, eventually, settings_in

pytest.importorskip("vllm")

from flexkv.integration.common import far_fetches
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.setup import Setup

from .test_scheduler_side import Request, output

BLOCKS = 8
ALL = BLOCKS * PER_BLOCK
OP_BLOCKS = 4
"""How many blocks arrive at once."""
TIMEOUT_S = 2.0
WAITS = (None, False)


class Rig:
    """A scheduler's side, a server with a far tier, and the agent of the one rank.

    Attributes:
        now_s: the time that prompts wait by.
        sent: the messages of the scheduler's side that are about prompts.
    """

    def __init__(
        self, folder: Path, has_far: bool = True, tells_events: bool = False, **cache: Any
    ) -> None:
        chunk_mb = MODEL.spaces(PER_BLOCK)[0].stride_bytes / 2**20  # see `SINGLE_HOP_CHUNKS`
        settings = settings_in(
            folder, **{"num_ssd_blocks": 0, "num_cpu_blocks": 64, "chunk_mb": chunk_mb, **cache}
        )
        settings = settings.model_copy(update={"match_wait_ms": 10_000, "server_answer_ms": 60_000})
        self.served = FarServer(MODEL, settings, has_far)
        self.side = SchedulerSide(Setup(MODEL, settings, 0, False, tells_events=tells_events))
        self.agent = Peer(settings, "agent")
        eventually(self.side._ready)
        self.now_s, self.sent = 1000.0, list[Message]()
        send = self.side.client._send

        def recorded(message: Message) -> bool:
            self.sent.append(message)
            return send(message)

        self.side.client._send = recorded  # type: ignore[method-assign]

    def request(self, name: str, seed: int = 0, **params: Any) -> Request:
        """Return a request whose prompt has 8 blocks and one more token."""
        made = Request(name, seed, num_tokens=ALL + 1)
        made.kv_transfer_params = params or None  # type: ignore[attr-defined]
        return made

    def keys(self, seed: int = 0) -> bytes:
        """Return the keys of such a prompt."""
        return self.side.client.keys(self.request("", seed).all_token_ids)

    def step(self, *new: tuple[str, list[int]]) -> Any:
        """Make a step that prefills whole prompts into blocks."""
        made = output(*new)
        made.num_scheduled_tokens = {name: ALL + 1 for name, _ in new}
        return self.side.build_connector_meta(made)

    def ask(self, request: Request) -> tuple[int | None, bool]:
        """Try a request, and return what it is offered."""
        return self.side.get_num_new_matched_tokens(request, 0)

    def fetched(self) -> None:
        """Let everything pass, and wait until no fetch is under way."""
        self.served.pass_transfers(None)
        eventually(lambda: (self.step(), not self.side._fetches.blocks_under_way)[1])

    def load(self, request: Request, blocks: list[int], tokens: int) -> Copy:
        """Load what a request is offered, and return the copy to the device."""
        ids = SimpleNamespace(get_block_ids=lambda: (blocks,))
        self.side.update_state_after_alloc(request, ids, tokens)
        self.step()
        copy: Copy = self.agent.hear(Copy)
        self.agent.say(Copied(copy.op_id))
        step = eventually(lambda: (made := self.step()).received and made)
        assert (step.received, step.failed_blocks) == ({request.request_id}, set())
        return copy

    def store(self, blocks: int, seed: int = 0) -> None:
        """Store the first blocks of a prompt from the device."""
        request = Request(f"stored {seed}", seed, num_tokens=blocks * PER_BLOCK + 1)
        self.ask(request)
        made = output((request.request_id, list(range(1, blocks + 2))))
        made.num_scheduled_tokens = {request.request_id: blocks * PER_BLOCK + 1}
        step = self.side.build_connector_meta(made)
        self.agent.say(Ready(tuple(step.puts)))
        self.agent.say(Copied(self.agent.hear(Copy).op_id))
        self.side.request_finished(request)
        eventually(lambda: (self.step(), request.request_id not in self.side._states)[1])

    def counts(self) -> dict[str, int]:
        """Return the counts of fetches since the last call."""
        told = self.side.take_stats()
        return {
            name: count
            for name, count in (told.data if told else {}).items()
            if count and ("fetch" in name or "far" in name)
        }

    def close(self) -> None:
        """Close everything; the server checks that nothing is left."""
        self.agent.close()
        self.side.close()
        self.served.close()


@pytest.fixture
def rig(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    """Yield a rig; the parameter is its configuration."""
    made = Rig(tmp_path, **getattr(request, "param", {}))
    clock = SimpleNamespace(monotonic=lambda: made.now_s)
    monkeypatch.setattr(far_fetches, "time", clock)
    yield made
    made.close()
