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

from collections.abc import Iterable
from typing import Any

from flexkv.common.errors import FlexKVError
from flexkv.integration.common.costs import Costs
from flexkv.integration.common.own_server import OwnServer
from flexkv.integration.common.pending_matches import PendingMatches
from flexkv.integration.common.transfers import TransferRules, Transfers
from flexkv.integration.vllm.events import KVEvents
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.prompt import Scopes
from flexkv.integration.vllm.request_state import RequestState, RequestStates
from flexkv.integration.vllm.setup import Setup
from flexkv.integration.vllm.stats import Counts, FlexKVStats
from flexkv.observe.logs import get_logger
from flexkv.server.client import Client
from flexkv.server.operator import command

log = get_logger(__name__)

STEPS_LATE = 4
"""The scheduler knows a scheduled token at most this many steps later."""


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
        self._pending_matches = PendingMatches(
            self.client, settings.match_wait_ms, setup.tells_events
        )
        self._scopes = Scopes(setup.names_media, setup.lora)
        self._per_block = cache.tokens_per_block
        self._requests = RequestStates(
            self.client, self._scopes, self._events, cache.tokens_per_block
        )
        self._states = self._requests.by_id
        self._counts = Counts(cache.num_log_interval_requests)
        wait_s = settings.server_answer_ms / 1e3
        self.transfers = Transfers(
            self.client, TransferRules(setup.gates_loads, setup.loads_by_layer, wait_s),
            StepMetadata, self._counts.count, self._forget, self._costs,
        )  # fmt: skip

    # -- loads ----------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Ask how much of a new request's prompt is resident, before the request is scheduled."""
        state = self._requests.track(request)
        blocks = self._wanted(state, 0)
        if blocks and self._pending_matches.has_early_room:
            part = self._requests.part(state, blocks)
            self._pending_matches.ask(state.transfers, part, 0, is_early=True)

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Return how many tokens after the computed ones can be loaded, and whether that is slow.

        The number is None if the server has not answered yet: vLLM asks again. If too many matches
        are under way for one more, a prompt is put off once in its life, then computed: vLLM serves
        younger prompts before one that is put off.

        Args:
            request: vLLM's request.
            computed: how many of its tokens the device has, in whole blocks.
        """
        state = self._requests.track(request)
        transfers, matches = state.transfers, self._pending_matches
        if not (blocks := self._wanted(state, computed)):
            matches.release(transfers)
            return 0, False
        transfers.local_blocks = computed // self._per_block
        found = matches.found(transfers, blocks, lambda n: self._requests.part(state, n))
        if found is None:
            self._counts.count("late_matches")
            return None, False
        transfers.found = found
        self._counts.count("matches")
        extra = found.blocks * self._per_block - computed
        if not self.client.is_ready:  # nothing can be loaded; that may be news since `_wanted`
            extra = 0
        if extra > 0 and self._costs and not self._costs.is_worth_it(found.by_tier, extra):
            self._counts.count("declined_blocks", extra // self._per_block)
            transfers.may_load = False
        elif extra > 0:
            self._counts.count("hits")
            self._counts.count("offered_blocks", extra // self._per_block)
            transfers.by_layer = self.transfers.suits_layers(transfers)
            return extra, not transfers.by_layer
        matches.release(transfers)
        return 0, False

    def _wanted(self, state: RequestState, computed: int) -> int:
        """Return how many blocks of a prompt could be loaded; 0 if none after those computed."""
        request = state.request
        may_load = state.transfers.may_load
        if not may_load or not self._requests.has_keys(state) or not self._ready():
            return 0
        if getattr(request, "skip_reading_prefix_cache", False):  # it wants every token's logits
            return 0
        # At least the last token has to be computed.
        blocks: int = (request.num_tokens - 1) // self._per_block
        return blocks if blocks * self._per_block > computed else 0

    def update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        """Begin to load into the blocks that were allocated, if any are to be loaded.

        Args:
            request: vLLM's request.
            blocks: all blocks that it has now.
            external: how many tokens to load, after those that the device has.
        """
        state = self._states.get(request.request_id)
        if state is None or state.transfers.found is None:
            return
        if not external:  # another connector's offer was taken
            self._pending_matches.release(state.transfers)
            return
        (ids,) = blocks.get_block_ids()
        last = state.transfers.local_blocks + external // self._per_block
        self.transfers.load(state.transfers, [ids], last)

    # -- puts, and each step --------------------------------------------------------------------

    def build_connector_meta(self, output: Any) -> StepMetadata:
        """Return what the workers do in this step.

        Args:
            output: vLLM's `SchedulerOutput`.
        """
        self._poll()
        for new in output.scheduled_new_reqs:
            state = self._states.get(new.req_id)
            if state is not None:
                state.transfers.block_ids = list(new.block_ids[0])
                first = new.num_computed_tokens // self._per_block
                self.transfers.written(state.transfers, first)
                self._put(state, new.num_computed_tokens, output)
        self._go_on(output)
        step = self.transfers.make_step()
        self._pending_matches.step_is_made()
        self.client.flush()
        if self._costs is not None:
            counts = output.num_scheduled_tokens.values()
            self._costs.step_begins(sum(count for count in counts if count > 1))
        return step

    def _go_on(self, output: Any) -> None:
        """Handle requests of earlier steps.

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
            transfers = state.transfers
            if new_ids is not None:
                first = len(transfers.block_ids)
                if request_id in cached.resumed_req_ids:
                    transfers.block_ids, first = [], computed // per_block
                    transfers.begins_anew(self.client.generation)
                transfers.block_ids += new_ids[0]
                self.transfers.written(transfers, first)
            if after >= (transfers.stored_blocks + 1) * per_block:
                self._put(state, computed, output)

    def _put(self, state: RequestState, computed: int, output: Any) -> None:
        """Begin a put of the whole blocks that a step completes, which is ready after the step."""
        if not self._requests.has_keys(state):
            return
        request, request_id = state.request, state.request.request_id
        after = computed + output.num_scheduled_tokens[request_id]
        # Drafts may be rejected.
        after -= len(output.scheduled_spec_decode_tokens.get(request_id, ()))
        blocks = min(after, len(request.all_token_ids)) // self._per_block
        if self.transfers.may_put(state.transfers, blocks):
            self.transfers.put(state.transfers, self._requests.part(state, blocks))

    def _poll(self) -> None:
        """Handle the transfers that have ended, and start the loads that waited for them."""
        self.transfers.poll()
        self._hear()
        if self._launched is not None and not self.client.is_ready:
            self._launched.look()

    def _forget(self, request_id: str) -> None:
        """Forget a request that is over, and what has changed for it until then."""
        self._hear()
        self._requests.forget(request_id)

    def request_finished(self, request: Any) -> bool:
        """Return whether puts still read the request's blocks; `sent` follows when they are done.

        vLLM by itself keeps the blocks of a request that is loading, until `received`.
        """
        state = self._states.get(request.request_id)
        if state is None:
            return False
        self._pending_matches.release(state.transfers)
        self._counts.request_ended()
        lora = getattr(request, "lora_request", None)
        if lora is not None and request.num_output_tokens:
            self._scopes.adapters.has_run(lora)
        return self.transfers.finish(state.transfers)

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
        self.transfers.blocks.reset()
        for request_id, state in list(self._states.items()):
            state.transfers.stored_blocks = 0
            if not state.transfers.has_begun:
                self._pending_matches.release(state.transfers)
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
