"""The real servers of the tests, together."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.mooncake import Mooncake
from tests.moto import Moto


class Servers(NamedTuple):
    """Servers that run as long as the session."""

    moto: Moto
    mooncake: Mooncake


@pytest.fixture(scope="session")
def servers(moto: Moto, mooncake: Mooncake) -> Servers:
    """Return the running servers."""
    return Servers(moto, mooncake)
