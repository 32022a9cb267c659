"""The real servers of the tests, together."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.mooncake import Mooncake
from tests.s3 import S3Server


class Servers(NamedTuple):
    """Servers that run as long as the session."""

    s3: S3Server
    mooncake: Mooncake


@pytest.fixture(scope="session")
def servers(s3: S3Server, mooncake: Mooncake) -> Servers:
    """Return the running servers."""
    return Servers(s3, mooncake)
