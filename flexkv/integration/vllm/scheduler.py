"""The scheduler's side: what to load, what to store, and when which block is free.

Per request, from vLLM's hooks:

    on_new_request             ─▶ match with a hold, sent as early as possible
    get_num_new_matched_tokens ─▶ its answer  ──update_state_after_alloc──▶ load ─Done─▶ received
                                  or "ask again": no step waits longer than `match_wait_ms`, and
                                  far blocks are fetched first (`far_fetches.py`)
    build_connector_meta       ─▶ whole blocks of this step: a put, which reads them after the
                                  forward; Done ─▶ its blocks may be reused
    request_finished           ─▶ blocks stay until the puts that read them are done

Hazards, and how they are met:
- A block is freed (preemption, sliding window) while a put reads it, and given to another request:
  the step that would write it waits for that put; a load into it starts after the put.
- A load comes short: the rest of its blocks are reported as failed, or with several KV groups the
  request is, and it loads nothing any more (otherwise vLLM would ask, get the same offer, and loop
  for ever).
- Blocks before a window are given away by the very next step. For leaves see `leaf_sources.py`. If
  the prefix chain itself has a window, a put reads the blocks that vLLM has for the request in the
  step, and those that are gone are not stored.
- Prompts that load hold blocks and cannot be preempted. Too many of them would stop vLLM for ever:
  see `room.py`.
- The server dies: everything under way is reported as failed, after each worker has made sure that
  no copy is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flexkv.common.errors import FlexKVError
from flexkv.common.request import LeafBlocks
from flexkv.integration.common.costs import Costs
from flexkv.integration.common.far_fetches import FarFetches, FetchRules
from flexkv.integration.common.kv_groups import GroupIds, KVGroups
from flexkv.integration.common.own_server import OwnServer
from flexkv.integration.common.pending_matches import PendingMatches
from flexkv.integration.common.request_transfers import RequestTransfers, moved_by_tier
from flexkv.integration.common.transfers import TransferRules, Transfers
from flexkv.integration.vllm.events import KVEvents
from flexkv.integration.vllm.leaf_sources import LeafSources
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.prompt import Scopes
from flexkv.integration.vllm.request_state import RequestState, RequestStates
from flexkv.integration.vllm.room import Room
from flexkv.integration.vllm.setup import Setup
from flexkv.integration.vllm.stats import Counts, FlexKVStats
from flexkv.observe.logs import get_logger
from flexkv.server.client import Client
from flexkv.server.operator import command
from flexkv.server.wire import Matched

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
        told = setup.groups if setup.groups and setup.groups.fail_whole else None
        self._events = KVEvents(cache.tokens_per_block, told) if setup.tells_events else None
        self._costs = Costs() if cache.load_if_faster else None
        groups = self._groups = _kv_groups(setup)
        self._pending_matches = PendingMatches(
            self.client, settings.match_wait_ms, setup.tells_events, groups.drop
        )
        self._scopes = Scopes(setup.names_media, setup.lora)
        self._per_block = cache.tokens_per_block
        self._requests = RequestStates(
            self.client, self._scopes, self._events, cache.tokens_per_block
        )
        self._states = self._requests.by_id
        self._leaves = (
            LeafSources(groups, setup.groups) if setup.groups and groups.several else None
        )
        """Finds leaves that are worth storing; None with one KV group."""
        self.engine_groups = setup.groups
        self._chain = setup.groups.chain if setup.groups else 0
        self._block_state: Any = None
        """vLLM's tables of the blocks of the requests in a step."""
        self._mixes = setup.groups is None or setup.groups.mixes
        self._room = Room(setup.pool) if setup.pool else None
        self._counts = Counts(cache.num_log_interval_requests)
        wait_s = settings.server_answer_ms / 1e3
        self.transfers = Transfers(
            self.client, TransferRules(setup.gates_loads, setup.loads_by_layer, wait_s, groups),
            StepMetadata, self._counts.count, self._forget, self._costs,
        )  # fmt: skip
        rules = FetchRules(cache.prefetch_stop, cache.prefetch_timeout_ms / 1e3)
        self._fetches = FarFetches(
            self.client, groups, cache.tokens_per_block, rules, self._counts.count, self._costs
        )
        self.transfers.on_other_end = self._fetches.take

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

        The number is None if the server has not answered yet, or if the device has no room for one
        more load: then vLLM asks again. If too many matches are under way for one more, a prompt is
        put off once, and computed the next time: vLLM serves younger prompts before one that is put
        off.

        Args:
            request: vLLM's request.
            computed: how many of its tokens the device has, in whole blocks.
        """
        state = self._requests.track(request)
        transfers, matches, room = state.transfers, self._pending_matches, self._room
        if room is not None:
            room.leave(request.request_id)  # it has no blocks: it is new, was preempted, or failed
        if not (blocks := self._wanted(state, computed)):
            self._fetches.stop(transfers)
            matches.release(transfers)
            return 0, False
        if room is not None and room.is_full:  # no prompt that may load overtakes one that waits
            self._counts.count("late_loads")
            return None, False
        found = self._found(state, blocks, computed)
        if found is None:
            return None, False
        end = self._groups.aligned(found.blocks)
        extra = end * self._per_block - computed
        if not self.client.is_ready:  # nothing can be loaded; that may be news since `_wanted`
            extra = 0
        if extra > 0 and not self._is_worth_it(transfers, end):
            self._counts.count("declined_blocks", extra // self._per_block)
            transfers.may_load = False
        elif extra > 0:
            transfers.by_layer = self.transfers.suits_layers(transfers)
            if room is None or transfers.by_layer or room.fits(request.num_tokens):
                self._counts.count("hits")
                self._counts.count("offered_blocks", extra // self._per_block)
                return extra, not transfers.by_layer
            if room.may_wait():
                transfers.waits_for = (blocks, computed)
                self._counts.count("late_loads")
                return None, False
            self._counts.count("crowded_out_blocks", extra // self._per_block)
        matches.release(transfers)
        return 0, False

    def _found(self, state: RequestState, blocks: int, computed: int) -> Matched | None:
        """Return the match of a prompt that is tried; None if it is put off to the next step.

        That is so while the match is not known, or far blocks are fetched that may be worth it.
        """
        transfers = state.transfers
        waited_for, transfers.waits_for = transfers.waits_for, None
        if transfers.found is not None and waited_for == (blocks, computed):
            return transfers.found  # its hold was kept
        transfers.local_blocks = computed // self._per_block
        matches = self._pending_matches
        if self._fetches.waits(transfers):
            return None
        found = matches.found(transfers, blocks, lambda n: self._requests.part(state, n))
        if found is None:
            self._counts.count("late_matches")
            return None
        if self._fetches_first(state, found, blocks, is_tried=True):
            return None
        self._fetches.stop(transfers, found)
        transfers.found = found
        self._counts.count("matches")
        return found

    def _fetches_first(
        self, state: RequestState, found: Matched, blocks: int, is_tried: bool
    ) -> bool:
        """Return whether a prompt now waits for a fetch of what lies far behind its match."""
        if not found.far or not self._requests.has_keys(state):
            return False
        begun = self._fetches.begin(
            state.transfers, found, blocks, is_tried, lambda n: self._requests.part(state, n)
        )
        if begun:
            self._pending_matches.take_over(state.transfers)
        return begun

    def _is_worth_it(self, transfers: RequestTransfers, end: int) -> bool:
        """Return whether a load up to this block is faster than computing the blocks."""
        found, local = transfers.found, transfers.local_blocks
        assert found is not None
        if self._costs is None:
            return True
        moved = end - self._groups.first_to_load(end, local)
        by_tier = moved_by_tier(found, moved, local)
        return self._costs.is_worth_it(by_tier, (end - local) * self._per_block)

    def _wanted(self, state: RequestState, computed: int) -> int:
        """Return how many blocks of a prompt could be loaded; 0 if none after those computed."""
        request = state.request
        may_load = state.transfers.may_load
        if not may_load or not self._requests.has_keys(state) or not self._ready():
            return 0
        if getattr(request, "skip_reading_prefix_cache", False):  # it wants every token's logits
            return 0
        if computed and not self._mixes:
            return 0
        blocks = self._groups.wanted(request.num_tokens)
        return blocks if blocks * self._per_block > computed else 0

    def update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        """Begin to load into the blocks that were allocated, if any are to be loaded.

        Args:
            request: vLLM's request.
            blocks: all blocks that it has now.
            external: how many tokens to load, after those that the device has.
        """
        state = self._states.get(request.request_id)
        if state is None:
            return
        # It has no blocks to put until it is scheduled: a preempted request had others.
        state.transfers.block_ids = []
        if state.transfers.found is None:
            return
        if not external:  # another connector's offer was taken
            self._pending_matches.release(state.transfers)
            return
        if self._room is not None and not state.transfers.by_layer:
            self._room.enter(request.request_id, request.num_tokens)
        ids = self._by_group(blocks.get_block_ids())
        last = state.transfers.local_blocks + external // self._per_block
        self.transfers.load(state.transfers, ids, last)
        if self._leaves is not None:
            self._leaves.loaded(state, last)

    def _by_group(self, ids: Any) -> GroupIds:
        """Return a request's device blocks by FlexKV's KV groups; `ids` has them by vLLM's."""
        return [ids[self._chain]] if self._leaves is None else self._leaves.ids(ids)

    # -- puts, and each step --------------------------------------------------------------------

    def build_connector_meta(self, output: Any) -> StepMetadata:
        """Return what the workers do in this step.

        Args:
            output: vLLM's `SchedulerOutput`.
        """
        self._poll()
        self._block_state = getattr(output, "kv_connector_block_state", None)
        if self._leaves is not None:
            self._leaves.begin_step(output)
        for new in output.scheduled_new_reqs:
            state = self._states.get(new.req_id)
            if state is not None:
                self._has_blocks(state, new.block_ids, new.num_computed_tokens)
                self._put(state, new.num_computed_tokens, output)
                self._runs(state, new.num_computed_tokens + output.num_scheduled_tokens[new.req_id])
        self._go_on(output)
        copies = getattr(output, "kv_cache_block_copies", None) or ()
        self.transfers.overwritten([int(copy.dst_block_id) for copy in copies])
        # Among them are those of a prompt that loads, in groups that are not transferred.
        self.transfers.overwritten(getattr(output, "new_block_ids_to_zero", None) or ())
        step = self.transfers.make_step()
        self._pending_matches.step_is_made()
        if self._room is not None:
            self._room.step_is_made()
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
        resumed, room = cached.resumed_req_ids, self._room
        for request_id, new_ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            after = computed + scheduled[request_id]
            if room is not None and (request_id in room or request_id in resumed):
                self._runs(self._states.get(request_id), after)
            inside = computed % per_block
            is_inside = inside >= STEPS_LATE and inside + scheduled[request_id] < per_block
            if is_inside and new_ids is None and not drafts:
                continue
            state = self._states.get(request_id)
            if state is None:
                continue
            transfers = state.transfers
            if new_ids is not None:
                if request_id in resumed:
                    transfers.begins_anew(self.client.generation)
                    self._has_blocks(state, new_ids, computed)
                else:
                    self._has_more_blocks(state, new_ids)
            if after >= (transfers.stored_blocks + 1) * per_block:
                self._put(state, computed, output)

    def _runs(self, state: RequestState | None, after: int) -> None:
        """Record that a step computes a request up to `after`; its prompt may need more steps."""
        if self._room is not None and state is not None:
            self._room.runs(state.request.request_id, state.request.num_tokens, after)

    def _has_blocks(self, state: RequestState, ids: Sequence[list[int]], computed: int) -> None:
        """Record all device blocks of a request that is scheduled, by vLLM's groups."""
        transfers, groups = state.transfers, self.engine_groups
        transfers.block_ids, first = list(ids[self._chain]), computed // self._per_block
        if self._leaves is not None:
            self._leaves.begin(state)
        written = () if groups is None else groups.written(ids, computed)
        self.transfers.written(transfers, first, written)

    def _has_more_blocks(self, state: RequestState, ids: Sequence[list[int]]) -> None:
        """Record the further device blocks of a request, by vLLM's groups."""
        transfers, groups = state.transfers, self.engine_groups
        first = len(transfers.block_ids)
        transfers.block_ids += ids[self._chain]
        self.transfers.written(transfers, first, () if groups is None else groups.written(ids))

    def _put(self, state: RequestState, computed: int, output: Any) -> None:
        """Begin a put of the whole blocks that a step completes, which is ready after the step."""
        if not self._requests.has_keys(state):
            return
        request, request_id = state.request, state.request.request_id
        after = computed + output.num_scheduled_tokens[request_id]
        # Drafts may be rejected.
        after -= len(output.scheduled_spec_decode_tokens.get(request_id, ()))
        blocks = min(after, len(request.all_token_ids)) // self._per_block
        if not self._groups.chain_is_full:  # blocks before its window may be given back by now
            ids = self._block_state.get_block_ids(request_id)
            state.transfers.block_ids = list(ids[self._chain])
        leaves: tuple[LeafBlocks, ...] = ()
        if self._leaves is not None:
            leaves = self._leaves.of_step(state, computed, blocks)
        if self.transfers.may_put(state.transfers, blocks, leaves):
            self.transfers.put(state.transfers, self._requests.part(state, blocks), leaves)

    def _poll(self) -> None:
        """Handle the transfers that have ended, and start the loads that waited for them."""
        self.transfers.poll()
        for request_id, blocks, found in self._pending_matches.early_answers():
            self._fetches_first(self._states[request_id], found, blocks, is_tried=False)
        self._hear()
        if self._launched is not None and not self.client.is_ready:
            self._launched.look()

    def _forget(self, request_id: str) -> None:
        """Forget a request that is over, and what has changed for it until then."""
        self._hear()
        if self._room is not None:
            self._room.leave(request_id)
        self._requests.forget(request_id)

    def request_finished(self, request: Any, ids: Sequence[list[int]] | None = None) -> bool:
        """Return whether puts still read the request's blocks; `sent` follows when they are done.

        vLLM by itself keeps the blocks of a request that is loading, until `received`.

        Args:
            request: vLLM's request.
            ids: its device blocks, by vLLM's groups, if there are several.
        """
        state = self._states.get(request.request_id)
        if state is None:
            return False
        self._pending_matches.release(state.transfers)
        self._fetches.finish(state.transfers)
        self._counts.request_ended()
        lora = getattr(request, "lora_request", None)
        if lora is not None and request.num_output_tokens:
            self._scopes.adapters.has_run(lora)
        if self._leaves is not None and ids is not None and state.transfers.load is None:
            self._put_end(state, ids)
        return self.transfers.finish(state.transfers)

    def _put_end(self, state: RequestState, ids: Sequence[list[int]]) -> None:
        """Begin a put of the leaves at the end of a request that is over."""
        request, leaves = state.request, self._leaves
        assert leaves is not None
        if not self._requests.has_keys(state):
            return
        if not self._groups.chain_is_full:  # it has given blocks back since the last put
            state.transfers.block_ids = list(ids[self._chain])
        done = request.num_computed_tokens - getattr(request, "num_in_flight_tokens", 0)
        end, found = leaves.of_end(state, ids, min(done, len(request.all_token_ids)))
        if found and self.transfers.may_put(state.transfers, end, found):
            self.transfers.put(state.transfers, self._requests.part(state, end), found)

    def hit_sources(self, request: Any, tokens: int) -> dict[str, int]:
        """Return how many of the tokens of a request's load come from each tier, by its name."""
        state = self._states.get(request.request_id)
        load = None if state is None else state.transfers.load
        if load is None:
            return {}
        sources, left = dict[str, int](), tokens
        for tier, blocks in sorted(load.found.by_tier.items()):
            sources[tier] = min(blocks * self._per_block, left)
            left -= sources[tier]
        return {tier: count for tier, count in sources.items() if count}

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
        self._fetches.give_up_all()
        self.transfers.blocks.reset()
        for request_id, state in list(self._states.items()):
            state.transfers.stored_blocks, state.transfers.waits_for = 0, None
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


def _kv_groups(setup: Setup) -> KVGroups:
    """Return what prefixes need of each KV group of an engine."""
    per_block, told = setup.cache.tokens_per_block, setup.groups
    spaces = setup.model.spaces(per_block)
    if told is None:
        return KVGroups(spaces, per_block)
    return KVGroups(spaces, told.alignment_tokens, told.drops_last, told.fail_whole)
