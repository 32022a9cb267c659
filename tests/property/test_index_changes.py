"""What readers of the index's changes know, against the model, under any interleaving."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from flexkv.common.space import GroupRule
from flexkv.common.terms import Tier
from flexkv.index.change_hub import ChangeReader
from flexkv.index.recorder import Change
from flexkv.index.residency import READY
from flexkv.index.span_changes import SpanChange, SpanChanges, SpanStates
from tests.property.index_model import Driver
from tests.property.index_names import RULES, key_of
from tests.property.test_index import EVICTIONS, random_step

SEEDS = max(2, int(os.environ.get("INDEX_OPERATIONS", "4000")) // 500)
STEPS = 600

Places = dict[bytes, tuple[bool, bool]]
"""By a span's key, whether it is in host memory, and whether it is on the SSD."""
NOWHERE = False, False


def opened(random: Random, rules: tuple[GroupRule, ...]) -> Driver:
    """Return a small index with its model."""
    eviction = random.choice(EVICTIONS)
    return Driver(eviction, random.randint(2, 12), random.randint(2, 16), rules)


def random_steps(driver: Driver, random: Random) -> None:
    """Perform a few random operations; now and then check the model's own reader."""
    for _ in range(random.choice([0, 1, 1, 1, 2, 5])):
        random_step(driver, random)
    if random.random() < 0.1:
        driver._check_changes()


# -- readers -------------------------------------------------------------------------------------


class Read:
    """A reader, its limit, and how many changes there had been when it last took."""

    def __init__(self, reader: ChangeReader, seen: int) -> None:
        self.reader, self.seen = reader, seen


@pytest.mark.parametrize("seed", range(SEEDS))
def test_each_reader_gets_every_change_or_learns_that_it_lost_some(seed: int) -> None:
    """A reader gets all changes since its last take, or None if they were more than its limit.

    What other readers do, or fail to do, makes no difference.
    """
    random = Random(seed)
    driver = opened(random, RULES[seed % len(RULES)])
    hub, log, reads = driver.hub, list[Change](), list[Read]()
    reference = hub.reader(1 << 20)
    lost = 0
    for _ in range(STEPS):
        random_steps(driver, random)
        if driver.hub is not hub:  # it has restarted
            hub, log, reads, reference = driver.hub, [], [], driver.hub.reader(1 << 20)
            continue
        read = random.choice(reads) if reads else None
        told = read.reader.take() if read and random.random() < 0.5 else []
        log += reference.take() or []
        if told != [] and read:
            unread = log[read.seen :]
            assert told == (None if len(unread) > read.reader.limit else unread)
            lost += told is None
            read.seen = len(log)
        elif random.random() < 0.1:
            reads.append(Read(hub.reader(random.choice([1, 4, 30, 1000])), len(log)))
            log += reference.take() or []
        elif read and random.random() < 0.05:
            read.reader.close()
            reads.remove(read)
            assert read.reader.take() == []
    assert lost


# -- spans ---------------------------------------------------------------------------------------


def places_of(changes: list[SpanChange]) -> Places:
    """Return where spans are according to changes."""
    return {key: (on_host, on_disk) for key, on_host, on_disk in changes}


class Follower:
    """Knows where spans are by the steps of one walk, and by the changes."""

    def __init__(self, walk: Iterator[SpanStates]) -> None:
        self.known: Places = {}
        self.walk: Iterator[SpanStates] | None = walk
        self.is_whole = False
        """Whether it must know all."""

    def step(self) -> None:
        """Apply the next step of the walk."""
        states = next(self.walk, None) if self.walk else None
        if states is None:
            self.walk = None
            return
        keys = [key.tobytes() for key in states.keys]
        on_host, on_disk = states.on_host.tolist(), states.on_disk.tolist()
        assert all(map(any, zip(on_host, on_disk, strict=True)))
        self.known |= zip(keys, zip(on_host, on_disk, strict=True), strict=True)

    def apply(self, changes: list[SpanChange]) -> None:
        """Apply changes, after which nothing is unknown if the walk is over."""
        self.known |= places_of(changes)
        self.known = {key: places for key, places in self.known.items() if places != NOWHERE}
        self.is_whole = self.walk is None


class Source:
    """The changes of the spans of one size, their followers, and the truth."""

    def __init__(self, driver: Driver, size: int, limit: int) -> None:
        self.driver, self.size, self.hub = driver, size, driver.hub
        self.spans = SpanChanges(driver.hub, size, limit)
        self.followers: list[Follower] = []
        self.has_walked = False
        self.uses = Counter(map(key_of, driver.names))
        self.takes: Counter[str] = Counter()
        """How often something of interest happened."""

    def truth(self) -> Places:
        """Return where each span is, by the model."""
        ready = {
            path: tuple(
                tier in places and places[tier].state == READY for tier in (Tier.HOST, Tier.DISK)
            )
            for path, places in self.driver.blocks.items()
            if path[-1] < 0 or (len(path) - 1) % self.size == 0
        }
        return self.unshared(
            {key_of(path): places for path, places in ready.items() if places != NOWHERE}
        )

    def take(self) -> None:
        """Take the changes, and compare what each follower knows that has seen everything."""
        changes, has_walked = self.spans.take(), self.has_walked
        self.has_walked = any(follower.walk for follower in self.followers)
        if changes is None:
            self.takes["lost"] += 1
            self.followers = []
            return
        assert len({change.key for change in changes}) == len(changes)
        whole = next((follower for follower in self.followers if follower.is_whole), None)
        if whole and not has_walked:
            self.takes["quiet"] += bool(changes)
            for key, places in self.unshared(places_of(changes)).items():
                assert whole.known.get(key, NOWHERE) != places, "nothing has changed"
        truth = self.truth()
        for follower in self.followers:
            follower.apply(changes)
            self.takes["whole"] += follower.is_whole
            if follower.is_whole:
                assert self.unshared(follower.known) == truth

    def unshared(self, places: Places) -> Places:
        """Leave out the keys that are those of a block and of a leaf: another process made them."""
        return {key: each for key, each in places.items() if self.uses[key] < 2}

    def act(self, random: Random) -> None:
        """Begin, continue or abandon a walk, or take."""
        walking = [follower for follower in self.followers if follower.walk]
        what = random.random()
        if what < 0.35:
            self.take()
        elif what < 0.85 and walking:
            self.has_walked = True
            random.choice(walking).step()
        elif what < 0.9 and len(self.followers) < 3:
            self.followers.append(Follower(self.spans.walk(random.choice([1, 2, 7]))))
        elif what > 0.98 and walking:
            self.followers.remove(walking.pop())


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("rules", RULES, ids=range(len(RULES)))
def test_a_walk_and_later_changes_are_the_truth(rules: tuple[GroupRule, ...], seed: int) -> None:
    """Whoever applies a walk and what is taken later knows where each span is, at any moment.

    If no walk is under way, takes only tell of spans that are elsewhere than at the last take.
    """
    random = Random(seed)
    driver = opened(random, rules)
    sources: list[Source] = []
    takes: Counter[str] = Counter()
    for _ in range(STEPS):
        random_steps(driver, random)
        if not sources or sources[0].hub is not driver.hub:
            takes += sum((source.takes for source in sources), Counter())
            limits = 2, 1000, random.choice([6, 1000])
            sources = [
                Source(driver, size, limit) for size, limit in zip((1, 2, 4), limits, strict=True)
            ]
        for source in sources:
            source.act(random)
        if random.random() < 0.01:
            sources[-1].spans.close()
            sources[-1] = Source(driver, 4, 1000)
    takes += sum((source.takes for source in sources), Counter())
    assert all(takes[what] for what in ("whole", "quiet", "lost")), takes
    driver.finish()
