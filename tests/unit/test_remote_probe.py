"""Tests on a virtual clock that a store which answers again is soon used again."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from flexkv.common.errors import RemoteError
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.names import PoolDescription
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.store import Listed
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.remote_pool import SharedPool
from flexkv.tiers.remote_probe import ANSWER_S, PERIOD_S, Probe, TierState

DESCRIPTION = PoolDescription({"model": "a model"}, (64,), 2)
BOUND_S = 2 * PERIOD_S + ANSWER_S


class Rig:
    """A store that is silent for some time, and a tier that is down for some time.

    Attributes:
        asked_s: when the store was asked.
        tried_s: when the tier was put on trial.
    """

    kind = where = "scripted"

    def __init__(
        self, silent_s: tuple[float, float], down_s: tuple[float, float], hangs: bool
    ) -> None:
        self._silent_s, self._down_s, self._hangs = silent_s, down_s, hangs
        self.asked_s: list[float] = []
        self.tried_s: list[float] = []

    @property
    def now_s(self) -> float:
        """Return the time."""
        return asyncio.get_running_loop().time()

    async def head(self, name: str) -> Listed:
        """Answer, hang or fail; that there is no such object is an answer, too."""
        self.asked_s.append(self.now_s)
        if self._silent_s[0] <= self.now_s < self._silent_s[1]:
            if self._hangs:
                await asyncio.sleep(1e6)
            raise RemoteError(self.where, "head", "status 500")
        raise FileNotFoundError(name)

    def run(self, until_s: float) -> None:
        """Run a probe for some time."""

        async def main() -> None:
            requests = Requests(cast("OpenStore", self), RemoteOptions())
            probe = Probe(requests, SharedPool(requests.store, DESCRIPTION))
            state = TierState(
                lambda: self._down_s[0] <= self.now_s < self._down_s[1],
                lambda: self.tried_s.append(self.now_s),
            )
            task = asyncio.get_running_loop().create_task(probe.run(state))
            await asyncio.sleep(until_s)
            task.cancel()
            await asyncio.wait([task])
            kinds = requests.counts().requests
            assert kinds.get("head", 0) == len(self.asked_s)

        run_virtual(main())


@pytest.mark.parametrize("hangs", [True, False])
@pytest.mark.parametrize("answers_s", [20.0, 60.3, 61.1, 62.9])
def test_a_store_that_answers_again_is_tried_soon(answers_s: float, hangs: bool) -> None:
    """However long a store was silent, one trial follows its answer within seconds, none before."""
    rig = Rig((5.0, answers_s), (9.0, 1e9), hangs)
    rig.run(answers_s + 50)
    (tried_s,) = rig.tried_s
    assert answers_s <= tried_s <= answers_s + BOUND_S < answers_s + 5
    assert min(rig.asked_s) >= 9.0
    assert len(rig.asked_s) <= (answers_s + 50 - 9) / PERIOD_S + 1


def test_a_tier_that_is_up_asks_nothing() -> None:
    """While the tier is used, its store gets no probes, silent or not."""
    rig = Rig((0.0, 50.0), (1e9, 2e9), hangs=True)
    rig.run(100.0)
    assert not rig.asked_s


def test_a_store_that_answers_probes_only_gets_no_early_trials() -> None:
    """If probes were answered all the time, an answer says nothing about the failures."""
    rig = Rig((1e9, 2e9), (9.0, 1e9), hangs=True)
    rig.run(100.0)
    assert rig.asked_s
    assert not rig.tried_s


def test_a_silence_before_the_tier_recovered_is_forgotten() -> None:
    """A tier that came back by itself, and fails again later, needs a new silence."""
    rig = Rig((5.0, 20.0), (9.0, 19.0), hangs=False)
    rig.run(30.0)
    assert not rig.tried_s
