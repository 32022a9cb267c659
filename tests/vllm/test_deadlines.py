"""Tests of how long a request of vLLM says that it may wait for far blocks."""

from __future__ import annotations

from typing import Any

import pytest

from flexkv.common.errors import ConfigError

pytest.importorskip("vllm")

from flexkv.integration.vllm.deadlines import load_deadline_s

from .far_rig import WAITS, Rig, rig

__all__ = ["rig"]


def test_a_request_says_how_long_it_may_wait(rig: Rig) -> None:
    """A request's own deadline bounds its wait; with 0, nothing far is fetched for it at all."""
    rig.served.hold(rig.keys())
    rig.served.pass_transfers(0)
    hasty = rig.request("a", load_deadline_ms=0)
    rig.side.on_new_request(hasty)
    rig.step()
    assert rig.ask(hasty) == (0, False)
    assert rig.counts() == {}
    request = rig.request("b", load_deadline_ms=100)
    assert rig.ask(request) == WAITS
    rig.now_s += 0.099
    assert rig.ask(request) == WAITS
    rig.now_s += 0.001
    assert rig.ask(request) == (0, False)


@pytest.mark.parametrize("value", [-1, "100", True, float("nan"), float("inf"), [1], {"a": 1}])
def test_a_deadline_that_is_no_time_is_refused_by_name(
    rig: Rig, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The error names the field; the request is computed, and the engine goes on."""
    with pytest.raises(ConfigError, match=r"kv_transfer_params\.load_deadline_ms"):
        load_deadline_s({"load_deadline_ms": value})
    rig.served.hold(rig.keys())
    assert rig.ask(rig.request("a", load_deadline_ms=value)) == (0, False)
    assert caplog.text.count("load_deadline_refused") == 1
    assert "kv_transfer_params.load_deadline_ms" in caplog.text


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": True}, ["load_deadline_ms"], 5])
def test_other_parameters_of_a_request_are_none_of_our_business(params: Any) -> None:
    """Parameters for other connectors, or of any other kind, set no deadline."""
    assert load_deadline_s(params) is None


def test_deadlines_are_bounded() -> None:
    """A deadline in milliseconds becomes seconds, an hour at most."""
    assert load_deadline_s({"load_deadline_ms": 250}) == 0.25
    assert load_deadline_s({"load_deadline_ms": 10**400}) == 3600
