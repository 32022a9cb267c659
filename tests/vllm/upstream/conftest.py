"""Fixtures for engines without a model, by the names that tests ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .stand import CONNECTORS, Stand

Make = Callable[..., Stand]


@pytest.fixture(params=CONNECTORS)
def connector(request: pytest.FixtureRequest) -> str:
    """Return each way to FlexKV: the built-in shim, and our own connector."""
    return str(request.param)


@pytest.fixture
def make(connector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Yield a function that makes an engine; close the engines afterwards."""
    made: list[Stand] = []

    def begin(over: dict[str, Any] | None = None, **changes: Any) -> Stand:
        made.append(Stand(tmp_path, monkeypatch, over or CONNECTORS[connector], **changes))
        return made[-1]

    yield begin
    for stand in made:
        stand.close()


@pytest.fixture
def stand(make: Make) -> Stand:
    """Return an engine with the usual sizes."""
    return make()
