"""How long a client leaves a server alone that it could not connect to."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.common.config import ModelConfig, Settings
from flexkv.server import reconnect
from flexkv.server.client import Client
from flexkv.server.reconnect import RETRY_S, RETRY_S_MAX

MODEL = ModelConfig(num_layers=1, num_kv_heads=1, head_size=8, dtype="float16")


def test_each_failure_to_connect_doubles_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause after a failure doubles from RETRY_S up to RETRY_S_MAX, and grows no further."""
    now_s, tried_s = 0.0, list[float]()

    def connect(*_: Any) -> None:
        tried_s.append(now_s)
        raise OSError("no answer")

    monkeypatch.setattr(reconnect, "connect", connect)
    monkeypatch.setattr(reconnect, "time", SimpleNamespace(monotonic=lambda: now_s))
    client = Client(Settings(), MODEL)
    while len(tried_s) < 10:
        client.poll()
        now_s += RETRY_S
    pauses = [after - before for before, after in pairwise(tried_s)]
    assert pauses == [min(RETRY_S * 2**number, RETRY_S_MAX) for number in range(9)]
    client.close()
