"""The scheduler's side: what to load, what to store, and when which block is free.

Per request, from vLLM's hooks:

    on_new_request             ─▶ match with a hold, sent as early as possible
    get_num_new_matched_tokens ─▶ its answer  ──update_state_after_alloc──▶ load ─Done─▶ received
                                  or "ask again": no step waits longer than `match_wait_ms`
    build_connector_meta       ─▶ whole blocks of this step: a put, which reads them after the
                                  forward; Done ─▶ its blocks may be reused
    request_finished           ─▶ blocks stay until the puts that read them are done

Hazards, and how they are met:
- A block is freed (preemption, sliding window) while a put reads it, and given to another request:
  the step that would write it waits for that put; a load into it starts after the put.
- A load comes short: the rest of its blocks are reported as failed, and the request loads nothing
  any more (otherwise vLLM would ask, get the same offer, and loop for ever).
- The server dies: everything under way is reported as failed, after each worker has made sure that
  no copy is left.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from flexkv.common.errors import FlexKVError
from flexkv.common.terms import BlockIds
from flexkv.integration.common.costs import Costs
from flexkv.integration.common.device_blocks import DeviceBlocks
from flexkv.integration.common.own_server import OwnServer
from flexkv.integration.common.pending_matches import PendingMatches
from flexkv.integration.vllm.events import KVEvents
from flexkv.integration.vllm.layer_loads import ScheduledLayerLoads
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.prompt import Scopes
from flexkv.integration.vllm.request_state import Load, Put, RequestState, RequestStates, ids_of
from flexkv.integration.vllm.setup import Setup
from flexkv.integration.vllm.stats import Counts, FlexKVStats
from flexkv.observe.logs import get_logger
from flexkv.server.client import Client
from flexkv.server.operator import command
from flexkv.server.prompts import PromptPart
from flexkv.server.wire import Done, Matched

log = get_logger(__name__)

STEPS_LATE = 4
"""The scheduler knows a scheduled token at most this many steps later."""
ROOM_AGAIN_S = 0.002
"""Pause before a load is retried for which host memory had no room."""


class SchedulerSide:
    """The loads and puts of one engine."""

    def __init__(self, setup: Setup) -> None:
        """Launch the server, if this instance has to.

        Raises:
            ConfigError: the server cannot start: its address is in use, a size is beyond this
                machine, … The error names the key.
            BackendUnavailableError: the server cannot start for another reason.
        """
        cache, settings = setup.cache, setup.settings
        self._setup = setup
        self._launched = OwnServer(setup.model, settings) if setup.launches else None
        self.client = Client(settings, setup.model, setup.instance, setup.tells_events)
        self._events = KVEvents(cache.tokens_per_block) if setup.tells_events else None
        self._costs = Costs() if cache.load_if_faster else None
        self._pending_matches = PendingMatches(self.client, settings.match_wait_ms)
        self._scopes = Scopes(setup.names_media, setup.lora)
        self._per_block = cache.tokens_per_block
        self._requests = RequestStates(
            self.client, self._scopes, self._events, cache.tokens_per_block
        )
        self._states = self._requests.by_id
        self._of_number: dict[int, str] = {}
        self._layer_loads = ScheduledLayerLoads(setup, self.client)
        self._blocks = DeviceBlocks()
        self._fresh_puts: dict[int, BlockIds] = {}
        self._waiting: list[str] = []
        """Requests whose load waits: for their puts, for puts that read its blocks, or for room."""
        self._step = StepMetadata()
        self._counts = Counts(cache.num_log_interval_requests)

    # -- loads ----------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Ask how much of a new request's prompt is resident, before the request is scheduled."""
        state = self._requests.track(request)
        blocks = self._wanted(state, 0)
        if blocks and self._pending_matches.has_early_room:
            self._ask(state, blocks, 0, is_early=True)

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Return how many tokens after the computed ones can be loaded, and whether that is slow.

        The number is None if the server has not answered yet: vLLM asks again. If too many matches
        are under way for one more, a prompt is put off once in its life, then computed: vLLM serves
        younger prompts before one that is put off.

        Args:
            request: vLLM's request.
            computed: how many of its tokens the device has, in whole blocks.
        """
        state, local_blocks = self._requests.track(request), computed // self._per_block
        blocks = self._wanted(state, computed)
        if not blocks:
            self._release(state)
            return 0, False
        found = self._found(state, blocks, local_blocks)
        if found is None:
            self._counts.count("late_matches")
            return None, False
        state.found, state.local_blocks = found, local_blocks
        self._counts.count("matches")
        extra = found.blocks * self._per_block - computed
        if not self.client.is_ready:  # nothing can be loaded; that may be news since `_wanted`
            extra = 0
        if extra > 0 and self._costs and not self._costs.is_worth_it(found.by_tier, extra):
            self._counts.count("declined_blocks", extra // self._per_block)
            state.may_load = False
        elif extra > 0:
            self._counts.count("hits")
            self._counts.count("offered_blocks", extra // self._per_block)
            state.by_layer = self._layer_loads.suits(state)
            return extra, not state.by_layer
        self._release(state)
        return 0, False

    def _wanted(self, state: RequestState, computed: int) -> int:
        """Return how many blocks of a prompt could be loaded; 0 if none after those computed."""
        request = state.request
        if not state.may_load or not self._requests.has_keys(state) or not self._ready():
            return 0
        if getattr(request, "skip_reading_prefix_cache", False):  # it wants every token's logits
            return 0
        # At least the last token has to be computed.
        blocks: int = (request.num_tokens - 1) // self._per_block
        return blocks if blocks * self._per_block > computed else 0

    def _found(self, state: RequestState, blocks: int, local_blocks: int) -> Matched | None:
        """Return which of the first blocks are resident; None if that is not known in this step.

        Its tiers count the blocks from `local_blocks` on.
        """
        questions, request_id = self._pending_matches, state.request.request_id
        if (first := questions.first_of(request_id, blocks)) is not None:
            found = questions.answer(request_id)
            if found is None or found.blocks <= local_blocks or first == local_blocks:
                return found
            # The match was sent before the device's own blocks were known.
            state.found = found
        self._release(state)
        if questions.make_room():
            self._ask(state, blocks, local_blocks, is_early=False)
            return questions.answer(request_id)
        was_put_off, state.was_put_off = state.was_put_off, True
        return Matched(0, 0, {}) if was_put_off else None

    def _ask(self, state: RequestState, blocks: int, local_blocks: int, is_early: bool) -> None:
        """Ask how many of a prompt's first `blocks` blocks are resident."""
        part = self._requests.part(state, blocks)
        tell, state.is_told = self._events is not None and not state.is_told, True
        self._pending_matches.ask(state.request.request_id, part, local_blocks, tell, is_early)

    def update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        """Begin to load into the blocks that were allocated, if any are to be loaded.

        Args:
            request: vLLM's request.
            blocks: all blocks that it has now.
            external: how many tokens to load, after those that the device has.
        """
        state = self._states.get(request.request_id)
        if state is None or state.found is None:
            return
        if not external:  # another connector's offer was taken
            self._release(state)
            return
        (ids,) = blocks.get_block_ids()
        first = state.local_blocks
        last = first + external // self._per_block
        part = PromptPart(state.prompt, last)
        state.load, state.found = Load(part, first, list(ids[first:last]), state.found), None
        state.has_loaded = True
        if self._blocks.was_reset:
            self._blocks.written(list(ids[:last]), first)
        if not state.by_layer:
            self._start(request.request_id, state, state.load)
            return
        self._wait_for_readers(ids_of(state.load.block_ids))
        self._layer_loads.begin(state, self._step)

    def _start(self, request_id: str, state: RequestState, load: Load) -> None:
        """Begin a load, or let it wait: for its request's puts, puts that read its blocks, or room.

        So no request ever loads and stores at once, and vLLM is told only one end of each.
        """
        ids = ids_of(load.block_ids)
        if state.puts or self._blocks.are_read(ids) or load.again_s > time.monotonic():
            self._waiting.append(request_id)
            return
        gated = self._setup.gates_loads
        load.number = self.client.get(load.keys, load.first, ids, load.held, gated)
        self._of_number[load.number] = request_id
        if gated:
            self._step.loads.append(load.number)

    # -- puts, and each step --------------------------------------------------------------------

    def build_connector_meta(self, output: Any) -> StepMetadata:
        """Return what the workers do in this step.

        Args:
            output: vLLM's `SchedulerOutput`.
        """
        self._poll()
        fresh = list[int]()
        for new in output.scheduled_new_reqs:
            state = self._states.get(new.req_id)
            if state is not None:
                state.block_ids = list(new.block_ids[0])
                first = new.num_computed_tokens // self._per_block
                fresh += self._written(state, first)
                self._put(state, new.num_computed_tokens, output)
        self._go_on(output, fresh)
        if fresh and self._blocks.any_read:
            self._wait_for_readers(ids_of(fresh))
        puts, self._fresh_puts = self._fresh_puts, {}
        self._blocks.begin_puts(list(puts.values()), self.client.num_blocks)
        self._pending_matches.step_is_made()
        self.client.flush()
        if self._costs is not None:
            counts = output.num_scheduled_tokens.values()
            self._costs.step_begins(sum(count for count in counts if count > 1))
        step, self._step = self._step, StepMetadata()
        return step

    def _go_on(self, output: Any, fresh: list[int]) -> None:
        """Handle requests of earlier steps; add blocks that they are the first to write to `fresh`.

        Most of them complete no block in most steps, and are not even looked up then. The tokens of
        a block may become known a few steps after it was completed.
        """
        cached, scheduled = output.scheduled_cached_reqs, output.num_scheduled_tokens
        drafts, per_block = output.scheduled_spec_decode_tokens, self._per_block
        for request_id, new_ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            after = computed + scheduled[request_id]
            inside = computed % per_block
            is_inside = inside >= STEPS_LATE and inside + scheduled[request_id] < per_block
            if is_inside and new_ids is None and not drafts:
                continue
            state = self._states.get(request_id)
            if state is None:
                continue
            if new_ids is not None:
                first = len(state.block_ids)
                if request_id in cached.resumed_req_ids:
                    state.block_ids, first = [], computed // per_block
                    state.begins_anew(self.client.generation)
                state.block_ids += new_ids[0]
                fresh += self._written(state, first)
            if after >= (state.stored_blocks + 1) * per_block:
                self._put(state, computed, output)

    def _written(self, state: RequestState, first: int) -> list[int]:
        """Return a request's blocks from `first` on, which this step is the first to write."""
        self._blocks.written(state.block_ids, first)
        return state.block_ids[first:]

    def _put(self, state: RequestState, computed: int, output: Any) -> None:
        """Begin a put of the whole blocks that a step completes, which is ready after the step."""
        if state.is_stale or not self.client.is_ready or not self._requests.has_keys(state):
            return
        request_id = state.request.request_id
        first, after = state.stored_blocks, computed + output.num_scheduled_tokens[request_id]
        # Drafts may be rejected.
        after -= len(output.scheduled_spec_decode_tokens.get(request_id, ()))
        blocks = min(after, len(state.request.all_token_ids)) // self._per_block
        if not first < blocks <= len(state.block_ids):
            return
        if self._blocks.was_reset and self._blocks.are_old(state.block_ids[:blocks]):
            return
        ids = ids_of(state.block_ids[first:blocks])
        part = self._requests.part(state, blocks)
        number = self.client.put(part, first, ids, state.generation)
        state.stored_blocks = blocks
        state.puts[number] = Put(first, ids, state.generation)
        self._of_number[number] = request_id
        self._fresh_puts[number] = ids
        self._step.puts.append(number)

    def drop_puts_of(self, invalid: Collection[int]) -> None:
        """Cancel the puts of requests with blocks that could not be loaded."""
        for state in self._states.values():
            if state.puts and not set(state.block_ids).isdisjoint(invalid):
                self.client.cancel(list(state.puts))
                self._step.dropped.update(state.puts)
                state.stored_blocks = min(put.first for put in state.puts.values())

    def _wait_for_readers(self, fresh: BlockIds) -> None:
        """Return once no earlier put reads blocks that this step is the first to write.

        Such puts are cancelled. If they do not end soon, the client disconnects: the server stores
        nothing that they have read without checking that the client is still connected.
        """
        wait_s = self._setup.settings.server_answer_ms / 1e3  # it takes some milliseconds
        cancelled, until_s = set[int](), time.monotonic() + wait_s
        while self._blocks.are_read(fresh):
            readers = {
                number
                for state in self._states.values()
                for number, put in state.puts.items()
                if number not in self._fresh_puts and np.isin(put.block_ids, fresh).any()
            }
            self.client.cancel(list(readers - cancelled))
            self.client.flush()
            cancelled |= readers
            if time.monotonic() > until_s:
                self.client.give_up(f"{len(readers)} puts did not end within {wait_s} s")
            time.sleep(0.0001)
            self._poll()

    def _poll(self) -> None:
        """Handle the requests that have ended, and start the loads that waited for them."""
        ended = self.client.poll()
        self._hear()  # before the requests with the changed blocks are forgotten
        for done in ended:
            if (layered := self._layer_loads.take(done)) is not None:
                self._count_load(*layered, done)  # the workers have reported what failed
                continue
            request_id = self._of_number.pop(done.number, None)
            if request_id is not None:
                self._ended(request_id, self._states[request_id], done)
        waiting, self._waiting = self._waiting, []
        for request_id in waiting:
            state = self._states[request_id]
            assert state.load is not None
            if state.finished and not state.puts:
                self._load_over(request_id, state)
            else:
                self._start(request_id, state, state.load)
        if self._launched is not None and not self.client.is_ready:
            self._launched.look()

    def _ended(self, request_id: str, state: RequestState, done: Done) -> None:
        if done.number in state.puts:
            self._put_ended(request_id, state, done)
            return
        load = state.load
        assert load is not None
        now_s = time.monotonic()
        if done.status == "unready" and not state.finished and now_s < load.until_s:
            # Host memory has no room for blocks from SSD; other requests will end soon.
            load.number, load.again_s = None, now_s + ROOM_AGAIN_S
            self._waiting.append(request_id)
            return
        self._count_load(state, load, done)
        if done.moved < len(load.block_ids):
            self._step.failed_blocks.update(load.block_ids[done.moved :])
            self._step.settle.append(done.number)
        elif not load.first:
            state.stored_blocks = len(load.block_ids)
        self._load_over(request_id, state)

    def _count_load(self, state: RequestState, load: Load, done: Done) -> None:
        """Count a load that is over; a request whose load came short loads nothing any more."""
        self._counts.count("loads")
        self._counts.count("loaded_blocks", done.moved)
        if done.moved < len(load.block_ids):
            if not state.finished:
                log.warning("load_incomplete", request=state.request.request_id,
                            wanted=len(load.block_ids), loaded=done.moved, status=done.status,
                            reason=done.error)  # fmt: skip
            self._counts.count("failed_blocks", len(load.block_ids) - done.moved)
            state.may_load = False
        elif self._costs is not None:
            self._costs.loaded(load.found.by_tier, done.took_s)

    def _load_over(self, request_id: str, state: RequestState) -> None:
        state.load = None
        self._step.received.add(request_id)
        if state.finished:
            self._requests.forget(request_id)

    def _put_ended(self, request_id: str, state: RequestState, done: Done) -> None:
        put = state.puts.pop(done.number)
        self._counts.count("puts")
        self._counts.count("stored_blocks", done.moved)
        if self._fresh_puts.pop(done.number, None) is None:
            self._blocks.end_put(put.block_ids)
        if done.status != "success":
            self._counts.count("failed_puts", 0 if done.is_stale else 1)
            self._step.settle.append(done.number)
        if done.is_stale:  # the cache was cleared since its blocks were computed
            state.is_stale |= put.generation == state.generation
        # Later blocks would lack these as parents, so the next put stores these, too.
        elif done.error or done.status != "success":
            state.stored_blocks = min(state.stored_blocks, put.first)
        elif not done.moved and put.first:
            state.stored_blocks = 0
        if state.finished and not state.puts and state.load is None:
            self._step.sent.add(request_id)
            self._requests.forget(request_id)

    def request_finished(self, request: Any) -> bool:
        """Return whether puts still read the request's blocks; `sent` follows when they are done.

        vLLM by itself keeps the blocks of a request that is loading, until `received`.
        """
        request_id = request.request_id
        state = self._states.get(request_id)
        if state is None:
            return False
        self._release(state)
        self._counts.request_ended()
        state.finished = True
        lora = getattr(request, "lora_request", None)
        if lora is not None and request.num_output_tokens:
            self._scopes.adapters.has_run(lora)
        load = state.load
        if load is not None and load.number is None:
            # The load has not begun: `_poll` ends it once no put of the request is under way.
            if load.held:
                self.client.release([load.held])
            load.block_ids, load.held = [], 0
        elif load is not None and load.number is not None:
            self.client.cancel([load.number])
        elif state.puts:
            return True
        else:
            self._requests.forget(request_id)
        return False

    def take_stats(self) -> FlexKVStats | None:
        """Return the counts since the last call; None when there are none."""
        return self._counts.take()

    def step_ended(self) -> Iterable[Any]:
        """Record that a step is done, and return the KV events since the one before."""
        if self._costs is not None:
            self._costs.step_ends()
        if self._events is None:
            return ()
        self._hear()
        return self._events.take()

    def _hear(self) -> None:
        if self._events is not None:
            for changed in self.client.changes():
                self._events.hear(changed)

    def reset_cache(self) -> bool:
        """Forget every block of every tier, of all instances; return whether that was done.

        Nothing that was computed or loaded before a reset is stored after it.
        """
        self._pending_matches.give_up_all()  # their answers are from before
        self._blocks.reset()
        for request_id, state in list(self._states.items()):
            state.stored_blocks = 0
            if not (state.block_ids or state.load or state.puts):  # it has not begun
                self._release(state)
                self._requests.forget(request_id)
        try:
            command(self._setup.settings.server_recv_port, "clear")
        except FlexKVError as error:
            log.warning("cache_not_cleared", reason=str(error))
            return False
        self._poll()  # the server reports the new generation
        return True

    def close(self) -> None:
        """Disconnect, and end the server if we launched it."""
        self.client.close()
        if self._launched is not None:
            self._launched.close()

    # -- inside ---------------------------------------------------------------------------------

    def _ready(self) -> bool:
        """Return whether all workers have lent their devices to the server."""
        if not self.client.is_ready:
            self._poll()
        return self.client.is_ready

    def _release(self, state: RequestState) -> None:
        """Give up a request's match, or the offer that it has, and the hold."""
        self._pending_matches.give_up(state.request.request_id)
        found, state.found = state.found, None
        if found is not None and found.blocks:
            self.client.release([found.number])
