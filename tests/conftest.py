"""Setup of every test: hypothesis profiles, one thread per library, a umask, logging."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from flexkv.observe.logs import forget_configuration

pytest_plugins = [
    "tests.warning_policy", "tests.vllm.support", "tests.s3", "tests.mooncake",
    "tests.servers",
]  # fmt: skip

settings.register_profile(
    "ci", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("soak", settings.get_profile("ci"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Two tests run at once on two cores: spinning threads of a library would slow down the other test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background jobs ignore ctrl-C, and the programs that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Directories that tests make must not be writable by a group: an engine refuses them.
os.umask(0o022)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo the logging configuration of a test, because it is global to the process."""
    yield
    forget_configuration()
