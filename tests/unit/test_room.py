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
    """It needs whole blocks of every group, but in each no more than a request can hold."""
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


@pytest.mark.parametrize("moves", ["enter", "runs", "leave"])
def test_loads_wait_while_others_move(room: Room, moves: str) -> None:
    """They wait as long as some prompt begins, goes on or ends within each `WAIT_S`."""
    clock = room._now_s
    assert isinstance(clock, Clock)
    room.enter("a", 40)
    clock.now_s = WAIT_S - 1
    assert room.may_wait()
    {
        "enter": lambda: room.enter("b", 4),
        "runs": lambda: room.runs("a", 40, 20),
        "leave": lambda: room.leave("a"),
    }[moves]()
    clock.now_s += WAIT_S - 1
    assert room.may_wait()
    room.leave("unknown")
    clock.now_s += 1
    assert not room.may_wait()


def test_the_room_is_full_until_the_step_is_made(room: Room) -> None:
    """Once a load waits, all prompts behind it in the same step do."""
    room.enter("a", 40)
    assert not room.is_full
    room.may_wait()
    assert room.is_full
    room.step_is_made()
    assert not room.is_full


def test_it_is_said_once(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    """The log names the shortage once."""
    configure_logging("warning")
    for _ in range(2):
        room.may_wait()
    assert capsys.readouterr().err.count("loads_wait_for_blocks") == 1
