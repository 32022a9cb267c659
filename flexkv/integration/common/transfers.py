"""The loads and puts of all requests of one engine: which wait, and what their ends report.

    load   waits for its request's puts, for puts that read its blocks, and for room ─▶ get ─Done─▶
           `received`; what it lacks ─▶ `failed_blocks`, or its request ─▶ `failed`
    put    reads the blocks that a step completes, after its forward ─Done─▶ they may be reused
    write  a step waits for the puts of earlier steps that read the blocks which it is the first to
           write
    end    a request that is over keeps its blocks until its puts are done: `sent`

So no request ever loads and stores at once, and the engine is told only one end of each.

With several KV groups, a load is whole or it has failed: without the leaves that its end needs, the
blocks of the chain are worth nothing. The same holds if the engine has groups that are not
transferred. Blocks are known by their device ids, which are unique over all groups. An engine frees
the blocks behind a sliding window while a request goes on, and gives them away in the next step; so
a step waits a little for puts that read its blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from flexkv.common.request import LeafBlocks
from flexkv.common.terms import BlockIds, Tier
from flexkv.integration.common.costs import Costs
from flexkv.integration.common.device_blocks import DeviceBlocks
from flexkv.integration.common.kv_groups import GroupIds, KVGroups, joined
from flexkv.integration.common.request_transfers import (
    Load,
    Put,
    RequestTransfers,
    ids_of,
    with_leaves,
)
from flexkv.observe.logs import get_logger
from flexkv.server.client import Client
from flexkv.server.prompts import PromptPart
from flexkv.server.wire import Done

log = get_logger(__name__)


@dataclass
class StepTransfers:
    """What workers do and report in one step.

    Attributes:
        puts: numbers of puts that read what this step's forward writes.
        loads: numbers of gets that may write once the steps before this one are done.
        received: ids of requests whose loads are over.
        sent: ids of requests that have ended, and whose blocks no put reads any more.
        layer_loads: numbers of gets by layer that this step's forward waits for, and the device
            blocks of each.
        failed_blocks: device blocks that should have been loaded and were not, if the engine has
            one KV group.
        failed: if it has several, ids of requests whose loads failed as a whole. They are in
            `received`, too.
        dropped: numbers of puts of requests some of whose blocks could not be loaded.
        settle: numbers of failed puts and gets: the worker waits until none of their copies is
            left before it reports anything.
    """

    puts: list[int] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    layer_loads: dict[int, list[int]] = field(default_factory=dict)
    received: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    settle: list[int] = field(default_factory=list)


Step = TypeVar("Step", bound=StepTransfers)


class TransferRules(NamedTuple):
    """How an engine's transfers run.

    Attributes:
        gates_loads: whether loads wait until the workers have finished the step under way.
        loads_by_layer: whether a step loads blocks of host memory itself, layer by layer.
        wait_s: how long a step waits for cancelled puts before it disconnects.
        groups: the engine's KV groups, if they are known.
        grace_s: how long a step of an engine whose loads fail as a whole waits for the puts that
            read its blocks before it cancels them.
    """

    gates_loads: bool
    loads_by_layer: bool
    wait_s: float
    groups: KVGroups | None = None
    grace_s: float = 0.05


class Transfers(Generic[Step]):
    """The loads and puts of one engine.

    Attributes:
        blocks: the blocks of the device.
        on_other_end: called with the end of a request that is neither a load nor a put.
    """

    def __init__(
        self, client: Client, rules: TransferRules, new_step: Callable[[], Step],
        count: Callable[[str, int], None], forget: Callable[[str], None], costs: Costs | None,
    ) -> None:  # fmt: skip
        """Begin with no transfers.

        Args:
            client: sends the gets and puts.
            rules: how they run.
            new_step: makes an empty report of a step.
            count: adds to the count of this name.
            forget: called with the id of a request that is over and has no transfer left.
            costs: learns how long loads take.
        """
        self._client, self._rules, self._new_step = client, rules, new_step
        self._count, self._forget, self._costs = count, forget, costs
        groups = rules.groups
        self._groups = groups if groups is not None and groups.fail_whole else None
        self._has_null = groups is not None and not groups.chain_is_full
        self.blocks = DeviceBlocks(self._has_null)
        self._of_number: dict[int, RequestTransfers] = {}
        self._layer_loads: dict[int, tuple[RequestTransfers, Load]] = {}
        self._waiting: list[RequestTransfers] = []
        """Requests whose load waits."""
        self._written: list[int] = []
        """Blocks that the next step is the first to write."""
        self._fresh_puts: dict[int, BlockIds] = {}
        """The puts of the next step."""
        self._step = new_step()
        self.on_other_end: Callable[[Done], object] = lambda done: None

    # -- loads ----------------------------------------------------------------------------------

    def suits_layers(self, request: RequestTransfers) -> bool:
        """Return whether what was found for a request can be loaded in the step, layer by layer.

        It has to be in host memory: a step should not wait for the SSD, or for room. While puts of
        the request are under way, it loads nothing.
        """
        found = request.found
        if not self._rules.loads_by_layer or self._groups or found is None or request.puts:
            return False
        return found.by_tier.get(Tier.HOST.label, 0) >= found.blocks - request.local_blocks

    def load(self, request: RequestTransfers, group_ids: GroupIds, blocks: int) -> None:
        """Begin to load what is offered to a request.

        If the request loads by layer, this waits until no put reads the blocks, and the request
        runs in the step as if they were there.

        Args:
            request: has an offer, and a number of blocks that the device has.
            group_ids: all its device blocks, by KV group; those of the chain come first.
            blocks: where the load ends, in blocks of the chain. With several groups, the load fails
                if the request lacks a device block that a prefix of this length needs.
        """
        block_ids = [block or 0 for block in group_ids[0]]
        first = request.local_blocks
        if self._groups is not None:
            first = self._groups.first_to_load(blocks, first)
        load = request.accept(block_ids, first, blocks)
        if self.blocks.was_reset:
            self.blocks.written(block_ids[:blocks], load.first)
        if self._groups is not None:
            leaves = self._groups.to_load(group_ids, blocks, load.first)
            if leaves is None or min(load.block_ids, default=1) <= 0:
                self._refuse(request, load)
                return
            load.leaves, load.is_whole = leaves, True
        if not request.by_layer:
            self._start(request, load)
            return
        ids, gated = ids_of(load.block_ids), self._rules.gates_loads
        self._wait_for_readers(ids)
        number = self._client.get_by_layer(load.keys, load.first, ids, load.found.number, gated)
        self._layer_loads[number] = request, request.begin_layers()
        self._step.layer_loads[number] = load.block_ids

    def _refuse(self, request: RequestTransfers, load: Load) -> None:
        """Fail a load that was not begun, because the request lacks a device block for it."""
        log.error("load_refused", request=request.request_id, blocks=load.keys.blocks,
                  reason="the engine has a null block where the prefix needs one")  # fmt: skip
        self._client.release([load.found.number])
        request.load, request.may_load, request.has_loaded = None, False, False
        self._count("loads", 1)
        self._count("failed_blocks", len(load.block_ids))
        self._step.failed.add(request.request_id)
        self._over(request, self._step.received)

    def _start(self, request: RequestTransfers, load: Load) -> None:
        if request.puts or self.blocks.are_read(load.device_ids) or load.again_s > time.monotonic():
            self._waiting.append(request)
            return
        ids, gated = ids_of(load.block_ids), self._rules.gates_loads
        load.number = self._client.get(
            load.keys, load.first, ids, load.found.number, gated, load.leaves
        )
        self._of_number[load.number] = request
        if gated:
            self._step.loads.append(load.number)

    # -- puts, and each step --------------------------------------------------------------------

    def written(
        self, request: RequestTransfers, first: int, leaves: Iterable[int | None] = ()
    ) -> None:
        """Record which of a request's blocks the next step is the first to write.

        Args:
            request: has its new blocks already.
            first: the first of them in the chain.
            leaves: the new device blocks of its other KV groups; null blocks are ignored.
        """
        self.blocks.written(request.block_ids, first)
        self._written += request.block_ids[first:]
        self._written += [block for block in leaves if block is not None and block > 0]

    def overwritten(self, block_ids: Iterable[int]) -> None:
        """Record that the next step overwrites device blocks that no request gets for it."""
        self._written += block_ids

    def may_put(
        self, request: RequestTransfers, blocks: int, leaves: Sequence[LeafBlocks] = ()
    ) -> bool:
        """Return whether a put of a request's first `blocks` blocks is allowed and stores anything.

        Args:
            request: the request.
            blocks: how many of its first blocks are whole after the step.
            leaves: leaves that would be stored as well.
        """
        if request.is_stale or not self._client.is_ready:
            return False
        if not 0 < blocks <= len(request.block_ids):
            return False
        if request.first_to_put(blocks, self._has_null) == blocks and not leaves:
            return False
        return not (self.blocks.was_reset and self.blocks.are_old(request.block_ids[:blocks]))

    def put(
        self, request: RequestTransfers, part: PromptPart, leaves: Sequence[LeafBlocks] = ()
    ) -> None:
        """Begin a put of the blocks up to a part's end, which is ready after the next step.

        Args:
            request: the request.
            part: the first blocks of its prompt; those that are stored already are left out, and
                those that the engine has taken back.
            leaves: blocks of other KV groups at positions of the part; the request keeps them until
                after the next step. Those without a device block are left out; if a position of a
                group is named twice, the last entry counts.
        """
        blocks = part.blocks
        first = request.first_to_put(blocks, self._has_null)
        ids, leaves = ids_of(request.block_ids[first:blocks]), joined(leaves)
        number = self._client.put(part, first, ids, request.generation, leaves=leaves)
        read = with_leaves(ids, leaves)
        gap = self._has_null and first > 0 and not request.block_ids[first - 1]
        request.begin_put(number, Put(first, blocks, read, request.generation, gap))
        self._of_number[number] = request
        self._fresh_puts[number] = read
        self._step.puts.append(number)

    def drop_puts_of(self, invalid: Collection[int]) -> None:
        """Cancel the puts of requests with device blocks that could not be loaded."""
        for request in dict.fromkeys(self._of_number.values()):
            if request.puts and not set(request.block_ids).isdisjoint(invalid):
                self._client.cancel(list(request.puts))
                self._step.dropped.update(request.puts)
                request.drop_puts()

    def make_step(self) -> Step:
        """Return what the workers do in the next step, once it may write its blocks."""
        written, self._written = self._written, []
        if written and self.blocks.any_read:
            self._wait_for_readers(ids_of(written))
        puts, self._fresh_puts = self._fresh_puts, {}
        self.blocks.begin_puts(list(puts.values()), self._client.num_blocks)
        step, self._step = self._step, self._new_step()
        return step

    def _wait_for_readers(self, ids: BlockIds) -> None:
        """Return once no put of an earlier step reads these blocks, which the next step writes.

        Such puts are cancelled, with several KV groups only after `grace_s`.
        If they do not end soon, the client disconnects: the server stores nothing that they have
        read without checking that the client is still connected.
        """
        wait_s = self._rules.wait_s  # it takes some milliseconds
        cancel_s = time.monotonic() + (self._rules.grace_s if self._groups else 0.0)
        cancelled, until_s = set[int](), cancel_s + wait_s
        while self.blocks.are_read(ids):
            readers = {
                number
                for number, request in self._of_number.items()
                if number not in self._fresh_puts
                and (put := request.puts.get(number)) is not None
                and np.isin(put.block_ids, ids).any()
            }
            if time.monotonic() >= cancel_s:
                self._client.cancel(list(readers - cancelled))
                cancelled |= readers
            self._client.flush()
            if time.monotonic() > until_s:
                self._client.give_up(f"{len(readers)} puts did not end within {wait_s} s")
            time.sleep(0.0001)
            self.poll()

    # -- ends -----------------------------------------------------------------------------------

    def poll(self) -> None:
        """Handle the transfers that have ended, and start the loads that waited for them."""
        for done in self._client.poll():
            if (request := self._of_number.pop(done.number, None)) is not None:
                if done.number in request.puts:
                    self._end_put(request, done)
                else:
                    self._end_load(request, done)
            elif (layered := self._layer_loads.pop(done.number, None)) is not None:
                request, load = layered  # the workers have reported what failed
                request.end_layers(load, done)
                self._record(request, load, done)
            else:
                self.on_other_end(done)
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            assert request.load is not None
            if request.finished and not request.puts:
                request.load = None
                self._over(request, self._step.received)
            else:
                self._start(request, request.load)

    def _end_load(self, request: RequestTransfers, done: Done) -> None:
        load = request.load
        assert load is not None
        if request.retries(done):
            self._waiting.append(request)
            return
        if missing := request.end_load(done):
            self._step.settle.append(done.number)
            if not load.is_whole:
                self._step.failed_blocks.update(missing)
            elif not request.finished:
                self._step.failed.add(request.request_id)
        self._record(request, load, done)
        self._over(request, self._step.received)

    def _record(self, request: RequestTransfers, load: Load, done: Done) -> None:
        """Count a load that is over, log it if it came short, and learn its cost otherwise."""
        wanted = len(load.block_ids)
        self._count("loads", 1)
        self._count("loaded_blocks", done.moved)
        if done.moved < wanted:
            if not request.finished:
                log.warning("load_incomplete", request=request.request_id, wanted=wanted,
                            loaded=done.moved, status=done.status, reason=done.error)  # fmt: skip
            self._count("failed_blocks", wanted - done.moved)
        elif self._costs is not None:
            self._costs.loaded(load.by_tier, done.took_s)

    def _over(self, request: RequestTransfers, reported: set[str]) -> None:
        reported.add(request.request_id)
        if request.finished:
            self._forget(request.request_id)

    def _end_put(self, request: RequestTransfers, done: Done) -> None:
        put = request.end_put(done)
        self._count("puts", 1)
        self._count("stored_blocks", done.moved)
        if self._fresh_puts.pop(done.number, None) is None:
            self.blocks.end_put(put.block_ids)
        if done.status != "success":
            self._count("failed_puts", 0 if done.is_stale else 1)
            self._step.settle.append(done.number)
        if request.finished and not request.puts and request.load is None:
            self._over(request, self._step.sent)

    def finish(self, request: RequestTransfers) -> bool:
        """End a request, and return whether its blocks have to stay until it is `sent`.

        An engine by itself keeps the blocks of a request that is loading, until it is `received`.
        """
        request.finished, load = True, request.load
        if load is None:
            if request.puts:
                return True
            self._forget(request.request_id)
        elif load.number is None:  # `poll` ends it once no put of the request is under way
            self._client.release([load.found.number])
        else:
            self._client.cancel([load.number])
        return False
