"""How often connections that prove nothing are served, by address and altogether."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.cluster import strangers
from flexkv.cluster.allowance import Allowance
from flexkv.cluster.strangers import ShutOut, StrangerLimits, Strangers, source_of

LIMITS = StrangerLimits(Allowance(4, 1.0), Allowance(8, 2.0), Allowance(10, 3.0))
A, B, C = (source_of(f"192.0.2.{n}") for n in range(3))


class Step(NamedTuple):
    """A connection that arrives a while after the one before, and may prove the secret."""

    after_s: float
    source: bytes
    proves: bool


STEPS = st.lists(
    st.builds(
        Step,
        st.one_of(st.just(0.0), st.floats(0, 4)),
        st.sampled_from([source_of(f"192.0.2.{n}") for n in range(8)]),
        st.booleans(),
    ),
    max_size=80,
)


def within(times: Sequence[float], allowance: Allowance) -> bool:
    """Return whether no interval has more of these times than an allowance has."""
    return all(
        end - begin + 1 <= allowance.burst + (times[end] - times[begin]) * allowance.per_s + 1e-3
        for begin, end in combinations(range(len(times)), 2)
    )


@given(STEPS)
def test_what_proves_nothing_is_bounded_in_every_interval(steps: list[Step]) -> None:
    """An address, and all unknown ones together, fail no more often than their allowances say."""
    tested, now_s, known = Strangers(LIMITS), 0.0, set[bytes]()
    failed: dict[tuple[bytes, bool], list[float]] = {}
    failed_unknown = []
    for step in steps:
        now_s += step.after_s
        arrival = tested.arrived(step.source, now_s)
        if arrival is None:
            continue
        if step.proves:
            tested.proved(arrival, now_s)
            known.add(step.source)
            continue
        is_known = step.source in known
        failed.setdefault((step.source, is_known), []).append(now_s)
        if not is_known:
            failed_unknown.append(now_s)
    for (_, is_known), times in failed.items():
        assert within(times, LIMITS.known if is_known else LIMITS.unknown)
    assert within(failed_unknown, LIMITS.all_unknown)


@given(STEPS)
def test_who_is_shut_out_is_exactly_who_would_not_be_served(steps: list[Step]) -> None:
    """What the kernel is told agrees with what is served, and somebody is let in after the time."""
    tested, now_s = Strangers(LIMITS), 0.0
    for step in steps:
        now_s += step.after_s
        shut, lasts_s = tested.shut_out(now_s)
        assert (lasts_s > 0) == (shut != ShutOut())
        arrival = tested.arrived(step.source, now_s)
        assert (arrival is None) == ((step.source in shut.sources) != shut.is_all)
        if arrival is not None and step.proves:
            tested.proved(arrival, now_s)
    shut, lasts_s = tested.shut_out(now_s)
    while lasts_s:
        now_s += lasts_s
        before, (shut, lasts_s) = shut, tested.shut_out(now_s)
        assert shut != before
    assert all(tested.arrived(source, now_s) is not None for source in (A, B, C))


def test_who_proves_the_secret_is_never_shut_out() -> None:
    """However many connections prove it at once, none of them costs the next one anything."""
    tested = Strangers(LIMITS)
    for _ in range(50):
        arrivals = [tested.arrived(A, 0.0) for _ in range(4)]
        assert arrivals[-1] is not None
        for arrival in arrivals:
            assert arrival is not None
            tested.proved(arrival, 0.0)
    assert tested.shut_out(0.0) == (ShutOut(), 0.0)


def test_a_known_address_has_an_allowance_of_its_own() -> None:
    """Strangers elsewhere shut out all that are unknown, and nobody that has proved the secret."""
    tested = Strangers(LIMITS)
    first = tested.arrived(A, 0.0)
    assert first is not None
    tested.proved(first, 0.0)
    for number in range(LIMITS.all_unknown.burst):
        assert tested.arrived(source_of(f"198.51.100.{number}"), 0.0) is not None
    assert tested.arrived(B, 0.0) is None
    assert tested.shut_out(0.0)[0] == ShutOut(frozenset({A}), is_all=True)
    for _ in range(LIMITS.known.burst):
        assert tested.arrived(A, 0.0) is not None
    assert tested.arrived(A, 0.0) is None
    assert tested.shut_out(0.0)[0] == ShutOut(frozenset(), is_all=True)


def test_a_proof_lets_an_address_in_at_once() -> None:
    """What was shut out while its proofs were under way is let in when they have come."""
    tested = Strangers(LIMITS)
    arrivals = [tested.arrived(A, 0.0) for _ in range(4)]
    assert tested.shut_out(0.0)[0] == ShutOut(frozenset({A}))
    assert arrivals[0] is not None
    tested.proved(arrivals[0], 0.0)
    assert tested.shut_out(0.0)[0] == ShutOut()
    assert tested.arrived(A, 0.0) is not None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that owe nothing are forgotten, and of known ones the longest unheard."""
    monkeypatch.setattr(strangers, "ACCOUNTS_MAX", 20)
    monkeypatch.setattr(strangers, "KNOWN_MAX", 3)
    tested = Strangers(LIMITS)
    for number in range(1000):
        arrival = tested.arrived(source_of(f"10.0.{number // 256}.{number % 256}"), number * 1.0)
        assert arrival is not None
        if number < 5:
            tested.proved(arrival, number * 1.0)
        assert len(tested._accounts) <= 20
        assert len(tested._known) <= 3
    assert list(tested._known) == [source_of(f"10.0.0.{number}") for number in (2, 3, 4)]


@pytest.mark.parametrize(
    ("ip", "source"),
    [
        ("192.0.2.7", "c0000207"),
        ("2001:db8:1:2:3:4:5:6", "20010db800010002"),
        ("fe80::1%lo", "fe80000000000000"),
        ("::ffff:192.0.2.7", "c0000207"),
    ],
)
def test_an_address_is_that_of_a_machine_or_its_network(ip: str, source: str) -> None:
    """Of IPv6 the first 64 bits count, since a machine has all of such a network."""
    assert source_of(ip).hex() == source


def test_log_lines_name_who_is_shut_out() -> None:
    """Addresses and networks are named, and only counted if they are those that are let in."""
    sources = frozenset({source_of("192.0.2.7"), source_of("2001:db8::1")})
    assert ShutOut(sources).named() == "192.0.2.7, 2001:db8::/64"
    assert ShutOut(sources, is_all=True).named() == "all but 2 known ones"
