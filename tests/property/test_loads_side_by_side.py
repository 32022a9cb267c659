"""Prompts that load beside others, against an engine that takes any load for which it has blocks.

The engine is worse than any version of vLLM: it reserves nothing for loads that it has taken, and
tries prompts in any order. Like vLLM, it takes no blocks back from a prompt that loads or has
loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexkv.integration.vllm.room import WAIT_S, Pool, Room

BLOCK, CHUNK, LONGEST = 4, 12, 60
"""Tokens of a block, of a step, and of the longest prompt with its answer."""


class Kind(NamedTuple):
    """How layers of a group keep blocks."""

    name: str
    reach: int = 0
    """Tokens of a window or a chunk of attention."""

    def first(self, computed: int) -> int:
        """Return the first block that the next token needs."""
        match self.name:
            case "window":
                return max(0, computed - self.reach + 1) // BLOCK
            case "chunks":
                return computed // self.reach * self.reach // BLOCK
            case "state":
                return max(0, -(-computed // BLOCK) - 1)
        return 0

    def new(self, computed: int, end: int) -> int:
        """Return how many further blocks a step up to `end` needs."""
        more = -(-end // BLOCK) - -(-computed // BLOCK)
        return min(more, 1) if self.name == "state" else more

    def held(self, computed: int) -> int:
        """Return how many blocks a prompt holds between two steps."""
        return -(-computed // BLOCK) - self.first(computed)

    def most(self) -> int:
        """Return how many blocks a request holds at most, as an engine plans its memory."""
        match self.name:
            case "window":
                return -(-min(self.reach - 1 + CHUNK, LONGEST) // BLOCK) + 1
            case "chunks":
                return -(-min(self.reach + CHUNK, LONGEST) // BLOCK)
            case "state":
                return 2
        return -(-LONGEST // BLOCK)


GROUPS = [Kind("full"), Kind("window", 6), Kind("window", 16), Kind("chunks", 8), Kind("state")]


class Asked:
    """A request."""

    def __init__(self, name: str, tokens: int, answer: int) -> None:
        self.name, self.tokens, self.end = name, tokens, tokens + answer
        self.computed = self.held = 0


class Device(RuleBasedStateMachine):
    """An engine with few blocks."""

    @initialize(data=st.data(), more=st.integers(0, 20))
    def begin(self, data: Any, more: int) -> None:
        """Start an engine in which the longest request fits by itself, and little else."""
        kinds = data.draw(st.lists(st.sampled_from(GROUPS[1:]), max_size=3))
        self.kinds = [GROUPS[0], *kinds]
        self.blocks = sum(kind.most() for kind in self.kinds) + more
        pool = Pool(self.blocks, tuple((BLOCK, kind.most()) for kind in self.kinds))
        self.now_s, self.count = 0.0, 0
        self.room = Room(pool, lambda: self.now_s)
        self.waiting: list[Asked] = []
        self.loading: list[Asked] = []
        self.running: list[Asked] = []

    @property
    def free(self) -> int:
        """Return how many blocks are free."""
        return self.blocks - sum(each.held for each in [*self.loading, *self.running])

    @rule(tokens=st.integers(2, LONGEST - 8), answer=st.integers(1, 8))
    def arrives(self, tokens: int, answer: int) -> None:
        """A prompt arrives."""
        self.count += 1
        self.waiting.append(Asked(str(self.count), tokens, answer))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def is_tried(self, data: Any) -> None:
        """A prompt is tried: it loads, or it is computed, or it waits."""
        asked = data.draw(st.sampled_from(self.waiting))
        self.room.leave(asked.name)
        hit = data.draw(st.integers(0, (asked.tokens - 1) // BLOCK)) * BLOCK
        if hit and self.room.fits(asked.tokens):
            needed = sum(kind.held(hit) for kind in self.kinds)
            if needed <= self.free:
                self.waiting.remove(asked)
                self.loading.append(asked)
                asked.computed, asked.held = hit, needed
                self.room.enter(asked.name, asked.tokens)
        elif (not hit or not self.room.may_wait()) and self.advances(asked):
            self.waiting.remove(asked)
            self.running.append(asked)

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def has_loaded(self, data: Any) -> None:
        """A prompt that has loaded is tried; if its next step does not fit, it keeps its blocks."""
        asked = data.draw(st.sampled_from(self.loading))
        if self.advances(asked):
            self.loading.remove(asked)
            self.running.append(asked)

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def fails(self, data: Any) -> None:
        """A load fails, and its request gives its blocks back."""
        asked = data.draw(st.sampled_from(self.loading))
        self.loading.remove(asked)
        self.gives_back(asked)

    @precondition(lambda self: self.running)
    @rule()
    def step(self) -> None:
        """Every running request goes on; the last ones give their blocks to those before them."""
        for asked in list(self.running):
            while asked in self.running and not self.advances(asked):
                self.gives_back(self.running.pop())
        self.running = [asked for asked in self.running if asked.computed < asked.end]

    @rule(data=st.data())
    def ends(self, data: Any) -> None:
        """A request is aborted."""
        for requests in (self.waiting, self.loading, self.running):
            if requests and data.draw(st.booleans()):
                self.room.leave(requests.pop().name)

    @rule(seconds=st.sampled_from([0.1, WAIT_S]))
    def time_passes(self, seconds: float) -> None:
        """Time passes in which nothing moves."""
        self.now_s += seconds

    def gives_back(self, asked: Asked) -> None:
        """Take a request's blocks; it waits again."""
        asked.computed = asked.held = 0
        self.waiting.append(asked)

    def advances(self, asked: Asked) -> bool:
        """Do a request's next step, if it gets the blocks."""
        kept = sum(kind.held(asked.computed) for kind in self.kinds)
        end = min(asked.computed + CHUNK, max(asked.tokens, asked.computed + 1))
        new = sum(kind.new(asked.computed, end) for kind in self.kinds)
        if new > self.free + asked.held - kept:
            return False
        asked.computed, asked.held = end, kept + new
        self.room.runs(asked.name, asked.tokens, end)
        return True

    @invariant()
    def each_can_go_on(self) -> None:
        """If nothing runs, any prompt that loads could be computed to its end at once."""
        if getattr(self, "running", None) is None or self.running:
            return
        for asked in self.loading:
            computed, held, free = asked.computed, asked.held, self.free
            while asked.computed < asked.tokens:
                assert self.advances(asked)
            asked.computed, asked.held = computed, held
            self.room.enter(asked.name, asked.tokens)
            assert free == self.free

    @invariant()
    def nothing_is_kept_too_long(self) -> None:
        """Only requests that have not ended count."""
        if hasattr(self, "waiting"):
            names = {each.name for each in [*self.waiting, *self.loading, *self.running]}
            assert set(self.room._needs) <= names

    def teardown(self) -> None:
        """Every request ends, whatever happened before."""
        for _ in range(2000):
            if not hasattr(self, "waiting") or not (self.waiting or self.loading or self.running):
                return
            for asked in list(self.loading):
                if self.advances(asked):
                    self.loading.remove(asked)
                    self.running.append(asked)
            for asked in list(self.waiting):
                self.room.leave(asked.name)
                if self.advances(asked):
                    self.waiting.remove(asked)
                    self.running.append(asked)
            if self.running:
                self.step()
        raise AssertionError("requests are left")


TestDevice = Device.TestCase
