"""Grants keep a bounded number of blocks for others, shared fairly, and end when they must."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from flexkv.cluster.grants import (
    BUSY_MS,
    IDLE_S,
    PREFETCH_S,
    READS_EACH,
    GrantLimits,
    Lent,
    ReadStatus,
)
from flexkv.cluster.wire import Busy, Grant, PeerId, PeerProtocolError, Want
from flexkv.common.errors import CapacityError, ClosedError, ConfigError, StorageError
from tests.cluster_rigs import keys_of, turns
from tests.unit.grants_rig import LIMITS, A, B, C, Rig, lent, with_grants


def test_one_peer_gets_half_and_more_peers_share() -> None:
    """A peer gets half of what is free, less what it has; a newcomer always gets something."""

    async def work(rig: Rig) -> None:
        prompts = [rig.stored(prompt, 100) for prompt in range(4)]
        for peer, keys in ((A, prompts[0]), (B, prompts[1]), (C, prompts[2]), (A, prompts[3])):
            rig.want(peer, keys, 0, 100)
        assert rig.answers == [
            Grant(1, 0, 50, True),
            Grant(2, 0, 25, True),
            Grant(3, 0, 13, True),
            Busy(4, BUSY_MS),
        ]
        assert rig.grants.counts.pinned_blocks == len(rig.owner.holds) == 88
        rig.grants.release(A, 1)
        rig.want(A, prompts[3], 0, 100)
        assert rig.answers[-1] == Grant(5, 0, 31, True)

    with_grants(work)


def test_a_block_that_several_grants_keep_counts_once() -> None:
    """Peers that want what others have already take no room."""

    async def work(rig: Rig) -> None:
        keys = rig.stored(1, 50)
        for peer in (A, B, C):
            rig.want(peer, keys, 0, 50)
        assert [getattr(each, "count", None) for each in rig.answers] == [50, 50, 50]
        assert rig.grants.counts.pinned_blocks == 50
        rig.grants.release(A, 1)
        rig.grants.release(B, 2)
        assert len(rig.owner.holds) == rig.grants.counts.pinned_blocks == 50
        rig.grants.end_peer(C)
        assert rig.grants.counts.pinned_blocks == 0

    with_grants(work)


def test_even_one_block_may_be_shared() -> None:
    """The smallest bound serves one block at a time."""

    async def work(rig: Rig) -> None:
        keys = rig.stored(1, 3)
        rig.want(A, keys, 0, 3)
        rig.want(B, keys, 1, 3)
        assert rig.answers == [Grant(1, 0, 1, True), Busy(2, BUSY_MS)]

    with_grants(work, GrantLimits(1))


def test_a_grant_says_whether_a_limit_cut_it() -> None:
    """A shorter grant means that the rest is not there, unless it says that a limit cut it."""

    async def work(rig: Rig) -> None:
        keys = keys_of(1, 300)
        rig.owner.put(keys, 0, 30)
        rig.want(A, keys, 10, 60)
        rig.want(B, keys, 30, 60)
        rig.owner.put(keys)
        rig.want(C, keys, 0, 300)
        assert rig.answers == [
            Grant(1, 10, 20, False),
            Grant(2, 30, 0, False),
            Grant(3, 0, 60, True),
        ]
        assert rig.grants.counts.missed == 1

    with_grants(work)


@pytest.mark.parametrize(
    ("limits", "wants"),
    [(LIMITS._replace(grants=3), [A, B, C, A]), (LIMITS._replace(grants_per_peer=3), [A] * 4)],
)
def test_the_number_of_grants_is_bounded(limits: GrantLimits, wants: list[PeerId]) -> None:
    """There is a most of grants, and of those of one peer; beyond it a peer has to ask later."""

    async def work(rig: Rig) -> None:
        keys = rig.stored(1, 2)
        for peer in wants:
            rig.want(peer, keys, 0, 2)
        assert rig.answers[-1] == Busy(4, BUSY_MS)
        assert rig.grants.counts.grants == 3
        rig.grants.release(A, 1)
        rig.want(A, keys, 0, 2)
        assert rig.answers[-1] == Grant(5, 0, 2)

    with_grants(work, limits)


def test_what_is_on_disk_is_fetched_first() -> None:
    """A Want waits for the disk, and what was in host memory stays there meanwhile."""

    async def work(rig: Rig) -> None:
        keys = keys_of(1, 20)
        rig.owner.put(keys, 0, 4)
        rig.owner.put_on_disk(keys, 4, 10)
        rig.want(A, keys, 2, 20)
        assert rig.answers == []
        assert len(rig.owner.holds) == 2
        await asyncio.sleep(rig.owner.prefetch_s + 0.01)
        assert rig.answers == [Grant(1, 2, 8, False)]
        rig.owner.put_on_disk(keys, 10, 11)
        rig.want(B, keys, 10, 20)
        await asyncio.sleep(rig.owner.prefetch_s + 0.01)
        assert rig.answers[1:] == [Grant(2, 10, 1, False)]
        assert rig.grants.counts.prefetched == 2

    with_grants(work)


def test_room_is_reserved_for_what_is_being_fetched() -> None:
    """Blocks on their way count, so that others are not granted their room."""

    async def work(rig: Rig) -> None:
        slow, fast = keys_of(1, 100), rig.stored(2, 100)
        rig.owner.put_on_disk(slow)
        rig.want(A, slow, 0, 100)
        rig.want(B, fast, 0, 100)
        assert rig.answers == [Grant(2, 0, 25, True)]
        await asyncio.sleep(rig.owner.prefetch_s + 0.01)
        assert rig.answers[1:] == [Grant(1, 0, 38, True)]
        assert rig.owner.held_max <= 100

    with_grants(work)


def test_few_wants_wait_for_the_disk_at_once() -> None:
    """Beyond the bound, a peer gets what is in host memory, or has to ask later."""
    limits = LIMITS._replace(prefetches=3, prefetches_per_peer=2)

    async def work(rig: Rig) -> None:
        prompts = [keys_of(prompt, 4) for prompt in range(6)]
        for keys in prompts:
            rig.owner.put_on_disk(keys)
        rig.owner.put(prompts[4], 0, 1)
        for peer, keys in zip((A, A, A, B, C, C), prompts, strict=True):
            rig.want(peer, keys, 0, 4)
        assert rig.answers == [Busy(3, BUSY_MS), Grant(5, 0, 1, True), Busy(6, BUSY_MS)]
        await turns()
        assert rig.owner.prefetching == 3
        await asyncio.sleep(rig.owner.prefetch_s + 0.01)
        told = sorted(rig.answers[3:], key=lambda each: each.number)
        assert told == [Grant(1, 0, 4), Grant(2, 0, 4), Grant(4, 0, 4)]
        rig.want(C, prompts[5], 0, 4)
        await asyncio.sleep(rig.owner.prefetch_s + 0.01)
        assert rig.answers[-1] == Grant(7, 0, 4)

    with_grants(work, limits)


def test_nothing_is_fetched_for_others_unless_that_is_allowed() -> None:
    """Without prefetches, blocks on disk are as good as gone."""

    async def work(rig: Rig) -> None:
        keys = keys_of(1, 4)
        rig.owner.put(keys, 0, 1)
        rig.owner.put_on_disk(keys)
        rig.want(A, keys, 0, 4)
        rig.want(A, keys, 1, 4)
        assert rig.answers == [Grant(1, 0, 1, False), Grant(2, 1, 0, False)]

    with_grants(work, LIMITS._replace(prefetches=0))


@pytest.mark.parametrize(
    "error",
    [
        StorageError("/data", 0, 5),
        CapacityError("host", 4, 0, 0),
        ConfigError("tier", "x", "is turned away"),
        ClosedError("closing"),
        None,
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_disk_that_fails_or_is_slow_makes_a_grant_shorter(error: Exception | None) -> None:
    """A prefetch that fails, or takes too long, leaves what is in host memory to be granted."""

    async def work(rig: Rig) -> None:
        keys = keys_of(1, 4)
        rig.owner.put(keys, 0, 1)
        rig.owner.put_on_disk(keys)
        rig.owner.prefetch_error = error
        if error is None:
            rig.owner.prefetch_s = 60.0
        rig.want(A, keys, 0, 4)
        await asyncio.sleep(PREFETCH_S + 0.1)
        assert rig.answers == [Grant(1, 0, 1, True)]

    with_grants(work)


def test_a_reader_that_waits_for_a_short_time_is_answered_in_it() -> None:
    """The disk is not waited for until the reader has given up."""

    async def work(rig: Rig) -> None:
        keys = keys_of(1, 4)
        rig.owner.put(keys, 0, 1)
        rig.owner.put_on_disk(keys)
        rig.owner.prefetch_s, rig.within_ms = 60.0, 400
        rig.want(A, keys, 0, 4)
        await asyncio.sleep(0.399)
        assert rig.answers == [Grant(1, 0, 1, True)]

    with_grants(work)


@pytest.mark.parametrize("by_release", [True, False])
def test_a_want_that_is_given_up_waits_for_no_disk(by_release: bool) -> None:
    """A Release, or the end of the link, ends a Want before its answer."""

    async def work(rig: Rig) -> None:
        keys = keys_of(1, 4)
        rig.owner.put(keys, 0, 1)
        rig.owner.put_on_disk(keys)
        for has_begun in (False, True):
            number = rig.want(A, keys, 0, 4)
            if has_begun:
                await asyncio.sleep(rig.owner.prefetch_s / 2)
            if by_release:
                rig.grants.release(A, number)
            else:
                rig.grants.end_peer(A)
            assert not rig.owner.holds
        await asyncio.sleep(1.0)
        assert rig.answers == []
        assert rig.owner.prefetching == 0
        assert keys[32:48] not in rig.owner.host

    with_grants(work)


def test_a_grant_ends_when_nothing_is_read() -> None:
    """30 s without a read end a grant; each read starts them anew, and a long one holds it."""

    async def work(rig: Rig) -> None:
        keys = rig.stored(1, 4)
        unread, read, long = (rig.want(peer, keys, 0, 4) for peer in (A, B, C))
        endless = lent(rig.grants.blocks(C, long, 0, 4))
        await asyncio.sleep(IDLE_S - 1)
        lent(rig.grants.blocks(B, read, 0, 1)).ended()
        await asyncio.sleep(2)
        assert rig.grants.blocks(A, unread, 0, 1) is ReadStatus.NO_GRANT
        lent(rig.grants.blocks(B, read, 0, 1)).ended()
        await asyncio.sleep(IDLE_S + 1)
        assert rig.grants.blocks(B, read, 0, 1) is ReadStatus.NO_GRANT
        await asyncio.sleep(3 * IDLE_S)
        endless.ended()
        await asyncio.sleep(IDLE_S - 1)
        assert rig.grants.counts.grants == 1
        await asyncio.sleep(2)
        assert rig.grants.counts.grants == 0
        assert rig.grants.counts.expired == 3
        assert not rig.owner.holds

    with_grants(work)


def test_one_timer_serves_all_grants() -> None:
    """Reads and grants set no timers of their own."""

    async def work(rig: Rig) -> None:
        keys = rig.stored(1, 4)
        for _ in range(20):
            number = rig.want(A, keys, 0, 4)
            lent(rig.grants.blocks(A, number, 0, 1)).ended()
        timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        assert len(timers) == 1
        rig.grants.end_peer(A)
        await asyncio.sleep(2 * IDLE_S)
        assert timers == []

    with_grants(work)


def test_only_what_was_granted_is_lent() -> None:
    """A read gets the blocks of its range, if its peer was granted all of it under that number."""

    async def work(rig: Rig) -> None:
        keys = rig.stored(1, 10)
        number = rig.want(A, keys, 2, 8)
        assert lent(rig.grants.blocks(A, number, 2, 6)).block_ids.tolist() == [2, 3, 4, 5, 6, 7]
        assert lent(rig.grants.blocks(A, number, 7, 1)).block_ids.tolist() == [7]
        for first, count in ((1, 1), (7, 2), (8, 1), (2, 7), (2, 0), (2, 2**32 - 1), (0, 3)):
            assert rig.grants.blocks(A, number, first, count) is ReadStatus.NOT_GRANTED
        later = PeerId(A.node_id, A.life + 1)
        for peer, asked in ((B, number), (A, number + 1), (later, number)):
            assert rig.grants.blocks(peer, asked, 2, 1) is ReadStatus.NO_GRANT
        assert rig.grants.counts.reads == 2

    with_grants(work_with_reads_ended(work))


def work_with_reads_ended(
    work: Callable[[Rig], Coroutine[Any, Any, None]],
) -> Callable[[Rig], Coroutine[Any, Any, None]]:
    """Return the work, after which every read that it began ends."""

    async def wrapped(rig: Rig) -> None:
        begun: list[Lent] = []
        blocks = rig.grants.blocks

        def keep(*arguments: Any) -> Lent | ReadStatus:
            told = blocks(*arguments)
            if isinstance(told, Lent):
                begun.append(told)
            return told

        rig.grants.blocks = keep  # type: ignore[method-assign]
        await work(rig)
        for each in begun:
            each.ended()

    return wrapped


def test_blocks_stay_while_they_are_being_sent() -> None:
    """The end of a grant releases its blocks when the last read has ended; no new one begins."""

    async def work(rig: Rig) -> None:
        keys = rig.stored(1, 4)
        for is_release in (True, False):
            number = rig.want(A, keys, 0, 4)
            first, second = (lent(rig.grants.blocks(A, number, 0, 4)) for _ in range(2))
            if is_release:
                rig.grants.release(A, number)
            else:
                rig.grants.end_peer(A)
            assert rig.grants.blocks(A, number, 0, 1) is ReadStatus.NO_GRANT
            first.ended()
            assert len(rig.owner.holds) == rig.grants.counts.pinned_blocks == 4
            second.ended()
            assert not rig.owner.holds

    with_grants(work)


def test_the_end_of_a_link_ends_all_grants_of_its_peer_at_once() -> None:
    """Nothing of them is lent or kept any more, long before they would expire; others' go on."""

    async def work(rig: Rig) -> None:
        keys, other = rig.stored(1, 4), rig.stored(2, 3)
        numbers = [rig.want(A, keys, 0, 4), rig.want(A, keys, 1, 3)]
        kept = rig.want(B, other, 0, 3)
        rig.grants.end_peer(A)
        for number in numbers:
            assert rig.grants.blocks(A, number, 1, 1) is ReadStatus.NO_GRANT
        assert rig.grants.counts.grants == 1
        assert len(rig.owner.holds) == rig.grants.counts.pinned_blocks == 3
        lent(rig.grants.blocks(B, kept, 0, 3)).ended()

    with_grants(work)


def test_what_is_not_granted_yet_is_not_lent() -> None:
    """A Want that waits for the disk lends nothing, not even what is in host memory."""

    async def work(rig: Rig) -> None:
        keys = keys_of(1, 4)
        rig.owner.put(keys, 0, 2)
        rig.owner.put_on_disk(keys)
        number = rig.want(A, keys, 0, 4)
        assert rig.grants.blocks(A, number, 0, 1) is ReadStatus.NO_GRANT

    with_grants(work)


def test_leaves_may_have_gaps() -> None:
    """Of other KV groups, those leaves are lent that are there."""

    async def work(rig: Rig) -> None:
        keys = keys_of(1, 8)
        rig.owner.put(keys, 2, 3)
        rig.owner.put(keys, 5, 7)
        number = rig.want(A, keys, 0, 8, group=1)
        assert rig.answers == [Grant(1, 0, 7, False)]
        assert rig.grants.counts.pinned_blocks == 3
        lent(rig.grants.blocks(A, number, 5, 2)).ended()
        lent(rig.grants.blocks(A, number, 2, 1)).ended()
        assert rig.grants.blocks(A, number, 2, 2) is ReadStatus.NOT_GRANTED

    with_grants(work)


def test_a_grant_is_read_a_bounded_number_of_times() -> None:
    """Its reads have as many blocks as are there, `READS_EACH` times; what is refused costs none.

    A reader that reads on takes nothing from others' network, and keeps what else it has.
    """

    async def work(rig: Rig) -> None:
        keys = keys_of(1, 8)
        rig.owner.put(keys, 0, 3)
        rig.owner.put(keys, 5, 7)
        number, other = (rig.want(A, keys, 0, 8, group=1) for _ in range(2))
        for _ in range(READS_EACH):
            assert rig.grants.blocks(A, number, 2, 2) is ReadStatus.NOT_GRANTED
            lent(rig.grants.blocks(A, number, 0, 3)).ended()
            lent(rig.grants.blocks(A, number, 5, 1)).ended()
        assert rig.grants.blocks(A, number, 0, READS_EACH + 1) is ReadStatus.TOO_OFTEN
        lent(rig.grants.blocks(A, number, 0, READS_EACH)).ended()
        assert rig.grants.blocks(A, number, 6, 1) is ReadStatus.TOO_OFTEN
        lent(rig.grants.blocks(A, other, 6, 1)).ended()

    with_grants(work)


WRONG_WANTS = {
    "no range": Want(2, keys_of(1, 4), 2, 2),
    "backwards": Want(2, keys_of(1, 4), 3, 2),
    "behind the prompt": Want(2, keys_of(1, 4), 0, 5),
    "cut keys": Want(2, keys_of(1, 4)[:-1], 0, 3),
    "no keys": Want(2, b"", 0, 1),
}


@pytest.mark.parametrize("want", WRONG_WANTS.values(), ids=WRONG_WANTS)
def test_a_want_that_makes_no_sense_is_refused(want: Want) -> None:
    """A Want must name a range of its keys."""

    async def work(rig: Rig) -> None:
        rig.stored(1, 4)
        with pytest.raises(PeerProtocolError, match="makes no sense"):
            rig.grants.want(A, want, rig.answers.append)
        assert rig.answers == []

    with_grants(work)


def test_a_number_in_use_is_refused() -> None:
    """A peer's numbers are its own, and each is used once at a time."""

    async def work(rig: Rig) -> None:
        keys = rig.stored(1, 4)
        rig.grants.want(A, Want(7, keys, 0, 4), rig.answers.append)
        rig.grants.want(B, Want(7, keys, 0, 4), rig.answers.append)
        with pytest.raises(PeerProtocolError, match="7 is in use"):
            rig.grants.want(A, Want(7, keys, 0, 4), rig.answers.append)
        rig.grants.release(C, 7)
        rig.grants.release(A, 7)
        rig.grants.release(A, 7)
        rig.grants.want(A, Want(7, keys, 0, 4), rig.answers.append)
        assert len(rig.answers) == 3

    with_grants(work)


def test_nothing_of_before_a_clear_is_read_or_granted_after_it() -> None:
    """A clear ends all grants; a Want that waits for the disk is not granted what comes later."""

    async def work(rig: Rig) -> None:
        there, waited = rig.stored(1, 4), keys_of(2, 4)
        rig.owner.put_on_disk(waited)
        granted = rig.want(A, there, 0, 4)
        reading = lent(rig.grants.blocks(A, granted, 0, 2))
        rig.want(B, waited, 0, 4)
        await turns()
        rig.grants.clear()
        assert rig.answers == [Grant(1, 0, 4), Grant(2, 0, 0)]
        assert rig.grants.blocks(A, granted, 0, 2) is ReadStatus.NO_GRANT
        assert len(rig.owner.holds) == 4, "until the read under way has ended"
        rig.owner.put(waited)
        await asyncio.sleep(PREFETCH_S + 1)
        assert len(rig.answers) == 2
        reading.ended()
        assert rig.grants.counts.pinned_blocks == 0
        rig.want(B, waited, 0, 4)
        assert rig.answers[2:] == [Grant(3, 0, 4)]

    with_grants(work)
