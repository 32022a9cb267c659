"""Breakers: when a direction of a tier is avoided, tried again, and used again."""

from __future__ import annotations

from flexkv.actors.health import BACKOFF_MAX_S, BACKOFF_MIN_S, FAILURES_MAX, Breaker, Health


def down(now_s: float = 0.0) -> Breaker:
    """Return a breaker that has just opened."""
    breaker = Breaker()
    assert [breaker.failed(now_s) for _ in range(FAILURES_MAX)] == [False] * (FAILURES_MAX - 1) + [
        True
    ]
    return breaker


def test_failures_in_a_row_open_it_and_single_ones_do_not() -> None:
    """A breaker opens after failures in a row; a success starts the count anew."""
    breaker = Breaker()
    for _ in range(10):
        assert not breaker.failed(0.0)
        assert not breaker.succeeded()
    assert breaker.usable(0.0)
    assert not down().usable(BACKOFF_MIN_S / 2)


def test_each_trial_that_fails_doubles_the_pause() -> None:
    """Each failed trial doubles the pause, up to a bound; failures of older ops do not count."""
    breaker, now_s, pause_s = down(), 0.0, BACKOFF_MIN_S
    for _ in range(10):
        assert not breaker.failed(now_s + pause_s / 2)
        now_s += pause_s
        assert breaker.usable(now_s)
        breaker.begun(now_s)
        assert not breaker.usable(now_s), "one trial at a time"
        assert breaker.failed(now_s)
        pause_s = min(2 * pause_s, BACKOFF_MAX_S)
        assert not breaker.usable(now_s + pause_s * 0.99)
    assert pause_s == BACKOFF_MAX_S


def test_a_trial_that_succeeds_closes_it() -> None:
    """A successful trial closes the breaker, and the next pause is the shortest again."""
    breaker = down()
    assert breaker.succeeded()
    assert breaker.health is Health.UP
    assert down().usable(BACKOFF_MIN_S)


def test_what_hangs_is_left_alone_until_something_comes_back() -> None:
    """A direction that hangs is not used until an I/O comes back, and is then tried at once."""
    breaker = Breaker()
    assert breaker.hung()
    assert not breaker.hung()
    assert not breaker.usable(1e9)
    assert breaker.came_back(5.0)
    assert not breaker.came_back(5.0)
    assert breaker.usable(5.0)
    assert breaker.succeeded()


def test_what_is_lost_stays_down() -> None:
    """A lost direction stays down, whatever trial, success, hang or late end follows."""
    breaker = Breaker()
    breaker.lose()
    assert not breaker.usable(1e9)
    assert not breaker.succeeded()
    assert not breaker.failed(1.0)
    assert not breaker.hung()
    assert not breaker.came_back(1.0)
    assert breaker.health is Health.DOWN
    assert not breaker.usable(1e9)


def test_one_end_does_not_bring_back_what_hangs() -> None:
    """A direction stays hung while any I/O is late; then a success brings it back."""
    breaker = Breaker()
    breaker.hung()
    assert not breaker.succeeded()
    assert not breaker.failed(0.0)
    assert breaker.health is Health.HUNG
    assert breaker.came_back(1.0)
    assert breaker.succeeded()
    assert breaker.health is Health.UP


def test_a_direction_that_is_down_can_be_tried_at_once() -> None:
    """`try_now` makes a direction due for one trial; if that fails, the pause doubles as ever."""
    breaker = down()
    assert not breaker.usable(0.1)
    assert breaker.is_failing
    breaker.try_now(0.1)
    assert breaker.usable(0.1)
    breaker.begun(0.1)
    assert not breaker.usable(0.2), "one trial at a time"
    assert breaker.failed(0.2)
    assert not breaker.usable(0.2 + 1.9 * BACKOFF_MIN_S)
    assert breaker.usable(0.2 + 2 * BACKOFF_MIN_S)
    assert breaker.succeeded()
    assert not breaker.is_failing


def test_what_is_lost_or_hangs_cannot_be_tried() -> None:
    """`try_now` brings back neither a direction that is lost nor one that hangs."""
    lost, hung = down(), Breaker()
    lost.lose()
    hung.hung()
    for breaker in (lost, hung):
        breaker.try_now(0.0)
        assert not breaker.usable(1e9)
    assert not lost.is_failing
    assert hung.is_failing
