"""The requests of clients, from their start to the answer.

A request may come with `when_ready`: it is planned once every rank has reported that its device
blocks are ready (those of a put are written). Ranks use other sockets than the client, so their
reports may arrive before the request.

A request may go by layer. A put is then planned when its first layer is ready, and each layer is
copied once every rank has reported it. For a get, the agents are told the plan and the end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from flexkv.common.errors import (
    ClearedError,
    ClosedError,
    ConfigError,
    FlexKVError,
    InternalError,
    cause_of,
)
from flexkv.common.request import KVResponse, LeafBlocks, Operation, Request, Span
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.engine import Engine
from flexkv.engine.runner import RequestOwner
from flexkv.engine.tickets import Ticket
from flexkv.graph.far import SetApart
from flexkv.index.found import Found
from flexkv.observe.logs import get_logger
from flexkv.server.agent_port import AgentPort
from flexkv.server.fleet import FleetPort, Instance, ids_from
from flexkv.server.job import Answered, Job, Reports, bytes_of, tell_end
from flexkv.server.leaves import has_twice, leaf_blocks
from flexkv.server.planning_turns import PlanningTurns
from flexkv.server.put_share import PutShare
from flexkv.server.wire import (
    Done,
    GetEnded,
    GetPlanned,
    Match,
    Matched,
    ProtocolError,
    Start,
    failed,
)

log = get_logger(__name__)

JOBS_MAX = 1 << 16
"""Maximum number of a client's requests under way, and of reports kept for requests to come."""
PUTS_SHARE = 2
"""The puts of one instance may be filling at most host memory divided by this."""
JOBS_BYTES_MAX = 64 << 20
"""Maximum bytes of keys and ids that the requests of one client may have under way."""
ENDS_KEPT = 256
"""How many ends of gets are told to an agent that reconnects: it may have missed them."""


class Jobs:
    """The requests of one instance's client."""

    def __init__(
        self,
        engine: Engine,
        fleet: FleetPort,
        instance: int,
        turns: PlanningTurns,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the requests of one instance, which has none yet.

        Args:
            engine: runs the requests.
            fleet: the devices of all instances.
            instance: the instance's number.
            turns: the turns in which the puts of all instances are planned.
            on_idle: called when the last request under way has ended.
        """
        self._engine, self._fleet, self._instance = engine, fleet, instance
        self._turns, self._on_idle = turns, on_idle
        self._jobs: dict[int, Job] = {}
        self._jobs_bytes = 0
        host_blocks = engine.residency.counts(Tier.HOST).capacity
        self._puts = PutShare(host_blocks // PUTS_SHARE)
        self._early: dict[int, Reports] = {}
        """Reports of requests that have not arrived; most never will, so the oldest are dropped."""
        self._ended_gets = deque[GetEnded](maxlen=ENDS_KEPT)

    @property
    def is_idle(self) -> bool:
        """Return whether no request is under way."""
        return not self._jobs

    def match(self, message: Match, keys: bytes, answer: Callable[[Matched], None]) -> None:
        """Answer how much of a prompt is resident, and hold it if the client asks for that.

        The answer is sent before the hold is made, because a step of the client's engine waits for
        it. Both happen in one turn of the loop, so nothing changes between them.

        Args:
            message: the client's message.
            keys: the prompt's root and block keys.
            answer: sends the answer.

        Raises:
            ConfigError: the keys are not valid.
        """
        engine = self._engine
        if not keys or len(keys) % BLOCK_KEY_BYTES:
            why = "must be 16 bytes for each key, including the root"
            raise ConfigError("keys", f"{len(keys)} bytes", why)
        keys = keys_within(engine, keys)
        blocks, has_leaves = len(keys) // BLOCK_KEY_BYTES - 1, len(engine.sizes.spaces) > 1
        # Leaves at positions that the client has are not needed.
        begin = min(message.first, blocks) if message.from_first or has_leaves else 0
        drop = min(message.drop, blocks)
        apart = self._found(message, keys, begin, drop)
        if message.hold:  # holds are counted, so no block may occur twice
            agreeing = engine.residency.agreeing(keys[: (apart.found.last + 1) * BLOCK_KEY_BYTES])
            if agreeing < apart.found.last:  # these keys were not derived from tokens
                begin, some = min(begin, agreeing), keys[: (agreeing + 1) * BLOCK_KEY_BYTES]
                apart = self._found(message, some, begin, drop)
        found = apart.found
        by_tier = {
            tier.label: place.block_count - place.positions.number_before(message.first)
            for tier, place in found.ready.items()
        }
        pending = found.pending.block_count if found.pending else 0
        run = self._host_run(keys, found, message)
        chain = max(found.last, found.chain)
        far, fetched, leaves = [
            {tier.label: count for tier, count in counts.items()}
            for counts in (apart.far, apart.fetched, found.leaves_by_tier)
        ]
        answer(
            Matched(message.number, found.last, by_tier, pending, run, chain, far, apart.coming,
                    fetched, leaves)
        )  # fmt: skip
        if message.hold:
            engine.requests.holds.hold(self._instance, message.number, found.holdings)

    def _found(self, message: Match, keys: bytes, begin: int, drop: int) -> SetApart:
        """Return where a prompt's blocks are, and if the client asks for it, what is far."""
        requests = self._engine.requests
        if message.apart or message.with_far:
            return requests.find_apart(keys, begin, drop, with_coming=not message.apart)
        return SetApart(requests.find(keys, begin, drop))

    def _host_run(self, keys: bytes, found: Found, message: Match) -> int:
        """Return how many blocks, from the match's first one on, a put need not store."""
        engine, first = self._engine, message.first
        blocks = len(keys) // BLOCK_KEY_BYTES - 1
        if len(engine.sizes.spaces) == 1 or first >= blocks:
            host = found.ready.get(Tier.HOST)
            return 0 if host is None else host.positions.leading(first)
        if not message.from_first:
            return 0
        per_block = engine.tokens_per_block
        span = Span(first, blocks, first * per_block, blocks * per_block)
        put = Request(Operation.PUT, 0, blocks * per_block, per_block, span, keys)
        return engine.requests.lacking_from(put) - first

    def release(self, numbers: tuple[int, ...] | None = None) -> None:
        """End holds, by default all; ignore those that have ended already."""
        if numbers is None:
            self._engine.requests.holds.release_group(self._instance)
            return
        for number in numbers:
            self._engine.requests.holds.release(self._instance, number)

    def start(self, start: Start, keys: bytes, answered: Answered) -> None:
        """Begin a request, and report its end exactly once, even if it is refused.

        Args:
            start: the client's message.
            keys: the prompt's root and block keys, up to the last block of the request.
            answered: called with the end.

        Raises:
            ConfigError: a request with its number is under way already.
        """
        if start.number in self._jobs:
            raise ConfigError("number", start.number, "is the number of a request under way")
        if why := self._refusal(start, keys):
            self.release((start.held,))
            done = Done(start.number, "failed", 0, why)
            tell_end(start, done, self._tell)
            answered(done)
            return
        now = self._engine.clears.generation
        generation = now if start.generation is None else min(now, start.generation)
        reports = self._early.pop(start.number, None) or self._no_reports()
        job = Job(start, keys, generation, reports, answered, self._tell)
        self._jobs[start.number] = job
        self._jobs_bytes += job.kept_bytes
        job.task = self._engine.supervisor.spawn("request", self._work(job))
        job.task.add_done_callback(lambda _: self._end(job))

    def _refusal(self, start: Start, keys: bytes) -> str:
        """Return why a request cannot begin; empty when it can."""
        if len(self._jobs) >= JOBS_MAX:
            return f"a client may have at most {JOBS_MAX} requests under way"
        if self._jobs_bytes + bytes_of(start, keys) > JOBS_BYTES_MAX:
            return f"a client may have at most {JOBS_BYTES_MAX} bytes of requests under way"
        if (reports := self._early.get(start.number)) is not None and reports.is_given_up:
            return "the engine gave it up before it arrived"
        try:
            if start.operation != Operation.PREFETCH.label:
                self._instance_of(start)
            _check(start, keys)
            self._leaves(start, keys)
        except (ClosedError, ConfigError) as error:
            return str(error)
        return ""

    def _leaves(self, start: Start, keys: bytes) -> tuple[LeafBlocks, ...]:
        """Return the device blocks of other KV groups that a request names.

        Raises:
            ConfigError: they break a rule, or a request by layer names some.
        """
        spaces = self._engine.sizes.spaces
        if start.by_layer and len(spaces) > 1:
            why = f"must be false for a model with several KV groups: this one has {len(spaces)}"
            raise ConfigError("by_layer", True, why)
        if start.leaves and start.operation == Operation.PREFETCH.label:
            why = "must be empty for a prefetch: no device takes part"
            raise ConfigError("leaves", f"{len(start.leaves)} runs", why)
        return leaf_blocks(start.leaves, len(keys) // BLOCK_KEY_BYTES - 1 - start.drop, spaces)

    def ready(self, numbers: tuple[int, ...], tp_rank: int, layers: int | None = None) -> None:
        """Record that a rank is ready for these requests, or for their first `layers` layers.

        Raises:
            ProtocolError: the model has fewer layers.
        """
        layers_max = self._engine.model.num_layers
        if layers is not None and layers > layers_max:
            raise ProtocolError(f"{layers} layers are written, the model has {layers_max}")
        feeds = False
        for number in numbers:
            job = self._jobs.get(number)
            reports = self._reports_of(number) if job is None else job.reports
            reports.written(tp_rank, layers or layers_max)
            if job is not None:
                job.reported()
                feeds |= job.is_fed
        if feeds:
            self._engine.nudge_device()

    def _reports_of(self, number: int) -> Reports:
        """Return the reports of a request that has not arrived."""
        if (reports := self._early.get(number)) is None:
            reports = self._early[number] = self._no_reports()
            if len(self._early) > JOBS_MAX:
                del self._early[next(iter(self._early))]
        return reports

    def _no_reports(self) -> Reports:
        return Reports(self._engine.model.tp_size, self._engine.model.num_layers)

    def cancel(self, numbers: tuple[int, ...] | None = None) -> None:
        """Cancel requests, by default all."""
        for number in list(self._jobs) if numbers is None else numbers:
            if (job := self._jobs.get(number)) is not None:
                job.cancel()

    def cancel_unready(self) -> None:
        """Cancel the requests that wait for a rank: its report will not come any more."""
        self.cancel(tuple(number for number, job in self._jobs.items() if job.is_unready))

    def unsettled(self, numbers: tuple[int, ...]) -> list[Job]:
        """Return the jobs of these requests whose blocks a device may still touch.

        A request that is unknown may still arrive, and is refused then.
        """
        jobs = []
        for number in numbers:
            job = self._jobs.get(number)
            if job is not None:
                jobs.append(job)
            else:
                self._reports_of(number).is_given_up = True
        return jobs

    def _tell(self, message: GetPlanned | GetEnded) -> None:
        """Tell every connected rank the plan or the end of a get by layer."""
        if isinstance(message, GetEnded):
            self._ended_gets.append(message)
        self._fleet.tell(self._instance, message)

    def tell_ends(self, port: AgentPort) -> None:
        """Tell a rank that has just connected which gets by layer are over."""
        for message in self._ended_gets:
            port.tell(message)

    async def _work(self, job: Job) -> None:
        try:
            await job.may_begin.wait()
            if job.start.operation == Operation.PUT.label:
                await self._turns.wait()
            begin_s = time.monotonic()
            request = self._request(job)
            response = await self._run(job, self._engine.requests.made(request))
            took_s = time.monotonic() - begin_s
            self._answer(job, _done(job.start, request, response, took_s))
        except FlexKVError as error:
            self._answer(job, failed(job.start.number, error))
            if isinstance(error, InternalError):
                raise  # the engine's state is wrong, so it must serve nobody any more

    async def _run(self, job: Job, ticket: Ticket) -> KVResponse:
        """Run a request; a put waits until its instance is not filling too many blocks."""
        request = ticket.request
        turn = RequestOwner(
            self._instance,
            lambda: self._check_chain(request.keys),
            lambda: self.release((job.start.held,)),
        )
        if request.operation is not Operation.PUT:
            return await ticket.run(turn)
        blocks = request.span.last_block - request.span.first_block
        blocks += sum(len(leaves.device_ids) for leaves in request.leaves)
        await self._puts.enter(blocks)
        job.starve_after(self._engine.cache.io_deadline_s)
        try:
            return await ticket.run(turn)
        finally:
            self._puts.leave(blocks)

    def _answer(self, job: Job, done: Done) -> None:
        """Report the end of a request, which holds nothing any more then."""
        self.release((job.start.held,))
        job.answer(done)

    def turn_away(self, why: str) -> None:
        """Refuse the puts that wait for earlier puts, because the devices do not answer."""
        self._puts.turn_away(ClosedError(why))

    def _end(self, job: Job) -> None:
        """Clean up after a request; its task may have been cancelled before its first step."""
        del self._jobs[job.start.number]
        self._jobs_bytes -= job.kept_bytes
        self.release((job.start.held,))
        if job.task is not None and job.task.cancelled():
            job.answer(Done(job.start.number, "cancelled", 0))
        job.end()
        if self.is_idle:
            self._on_idle()

    def _instance_of(self, start: Start) -> Instance:
        """Return the instance that a request is for.

        Raises:
            ClosedError: its devices are not connected, do not answer, or have another epoch.
        """
        instance = self._fleet.instances.get(self._instance)
        if instance is None or instance.epoch is None or instance.epoch != start.epoch:
            raise ClosedError("the instance's devices are not connected, or have reconnected since")
        if instance.stuck:
            raise ClosedError(instance.stuck)
        return instance

    def _check_chain(self, keys: bytes) -> None:
        """Check, right before a request is planned, that the index can take these keys.

        Raises:
            ConfigError: a block is named twice, or known under another parent. This never happens
                with keys that were derived from tokens.
        """
        blocks = len(keys) // BLOCK_KEY_BYTES - 1
        agreeing = self._engine.residency.agreeing(keys)
        if agreeing < blocks:
            why = "is named twice, or known under another parent"
            raise ConfigError(f"keys[{agreeing + 1}]", "a block", why)

    def _request(self, job: Job) -> Request:
        """Return a request in the core's terms.

        Raises:
            ClosedError: the instance's devices are not connected, or do not answer.
            ConfigError: a device block does not belong to the instance.
        """
        engine, fleet, start = self._engine, self._fleet, job.start
        operation = _OPERATIONS[start.operation]
        keys = keys_within(engine, job.keys)
        last = max(0, len(keys) // BLOCK_KEY_BYTES - 1 - start.drop)
        first = min(start.first, last)
        ids, leaves = None, list[LeafBlocks]()
        if operation is not Operation.PREFETCH:
            instance = self._instance_of(start)
            ids = fleet.ids_of(instance, ids_from(start.device_ids))[: last - first]
            for group, positions, leaf_ids in self._leaves(start, job.keys):
                count = positions.number_before(last)
                theirs = fleet.ids_of(instance, leaf_ids, f"leaves of KV group {group}")
                leaves.append(LeafBlocks(group, positions.part(0, count), theirs[:count]))
        per_block = engine.tokens_per_block
        return Request(
            operation,
            engine.next_request_id(),
            last * per_block,
            per_block,
            Span(first, last, first * per_block, last * per_block),
            keys,
            ids,
            start.namespace_hash,
            job if start.by_layer else None,
            job.generation,
            tuple(leaves),
            start.drop,
        )


def keys_within(engine: Engine, keys: bytes) -> bytes:
    """Return the first keys, for at most as many blocks as all tiers together can hold."""
    blocks_max = sum(engine.residency.counts(tier).capacity for tier in engine.residency.tiers)
    return keys[: (blocks_max + 1) * BLOCK_KEY_BYTES]


def _check(start: Start, keys: bytes) -> None:
    """Check what can be checked of a request without the engine.

    Raises:
        ConfigError: it breaks a rule.
    """
    if start.operation not in _OPERATIONS:
        raise ConfigError("operation", start.operation, f"must be one of {', '.join(_OPERATIONS)}")
    blocks, rest = divmod(len(keys), BLOCK_KEY_BYTES)
    if start.drop and start.operation == Operation.PUT.label:
        raise ConfigError("drop", start.drop, "must be 0 for a put")
    last = blocks - 1 - start.drop
    if rest or not 0 <= start.first <= last:
        raise ConfigError("first", start.first, f"must be from 0 to the number of blocks, {last}")
    if start.operation == Operation.PREFETCH.label:
        if start.by_layer:
            raise ConfigError(
                "by_layer", True, "must be false for a prefetch: no device takes part"
            )
        return
    ids, wanted = start.device_ids, last - start.first
    if len(ids) != wanted * 8:
        why = f"must be one id of 8 bytes for each of the {wanted} blocks"
        raise ConfigError("device_ids", f"{len(ids)} bytes", why)
    if has_twice(np.frombuffer(ids, np.int64)):
        raise ConfigError("device_ids", f"{wanted} ids", "must not name a block twice")


_OPERATIONS = {operation.label: operation for operation in Operation}


def _done(start: Start, request: Request, response: KVResponse, took_s: float) -> Done:
    per_block, error = request.tokens_per_block, response.error
    first, last, *_ = request.span
    blocks = response.return_mask[first * per_block : last * per_block : per_block]
    moved = int(np.count_nonzero(blocks))
    bits = b"" if blocks[:moved].all() else np.packbits(blocks).tobytes()
    is_stale = isinstance(error, ClearedError)
    told, cause = ("", None) if error is None else (str(error), cause_of(error))
    return Done(start.number, response.status.value, moved, told, took_s, is_stale, bits, cause)
