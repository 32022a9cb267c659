"""Which prompts may load at the same time; the law itself is a property test of its own."""

from __future__ import annotations

import pytest

from flexkv.integration.vllm.room import WAIT_S, Pool, Room
from flexkv.observe.logs import configure_logging

POOL = Pool(20, ((4, 10), (8, 2)))


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


@pytest.fixture
def room() -> Room:
    """Return the room of an engine with 20 blocks."""
    return Room(POOL, Clock())


@pytest.mark.parametrize(
    ("tokens", "more", "blocks"),
    [(1, 0, 2), (4, 0, 2), (5, 0, 3), (8, 0, 3), (9, 0, 5), (40, 0, 12), (400, 0, 12), (8, 1, 5)],
)
def test_what_a_request_needs(tokens: int, more: int, blocks: int) -> None:
    """It needs whole blocks of every group, and of each no more than the engine lets it hold."""
    assert POOL._replace(more_tokens=more).needed(tokens) == blocks


def test_a_load_fits_beside_others_up_to_all_blocks(room: Room) -> None:
    """Loads fit while all of them, each up to its end, need no more blocks than there are."""
    room.enter("a", 40)  # 12 blocks
    assert room.fits(24)  # 8 more
    assert not room.fits(25)
    room.leave("a")
    assert room.fits(25)


def test_a_single_load_always_fits() -> None:
    """A prompt that needs more than the device has is left to the engine."""
    assert Room(Pool(2, POOL.groups)).fits(40)


def test_a_prompt_counts_until_it_is_computed(room: Room) -> None:
    """It counts while it loads and in every step but the one that computes its last token."""
    room.enter("a", 40)
    room.runs("a", 40, 39)
    assert "a" in room
    room.runs("a", 40, 40)
    assert "a" not in room
    assert len(room) == 0


def test_a_load_waits_for_a_while(room: Room) -> None:
    """It waits from the first refusal on, however often it asks, and anew after it had blocks."""
    clock = room._now_s
    assert isinstance(clock, Clock)
    assert room.may_wait("a")
    clock.now_s = WAIT_S - 0.1
    assert room.may_wait("a")
    clock.now_s = WAIT_S
    assert not room.may_wait("a")
    room.enter("a", 4)
    assert room.may_wait("a")


def test_a_request_that_is_over_is_forgotten(room: Room) -> None:
    """It neither counts nor waits."""
    room.enter("a", 40)
    room.may_wait("b")
    for name in ("a", "b", "unknown"):
        room.forget(name)
    assert len(room) == 0
    assert room._waits == {}


def test_it_is_said_once(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    """The log names the shortage once."""
    configure_logging("warning")
    for name in ("a", "b"):
        room.may_wait(name)
    assert capsys.readouterr().err.count("loads_wait_for_blocks") == 1
