"""Servers that the contract tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.moto import Moto, running


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    """Yield a real S3 server."""
    with running() as server:
        yield server
