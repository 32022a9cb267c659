"""Tasks that serve one peer end alone; what breaks the engine's state ends the engine."""

from __future__ import annotations

import asyncio

import pytest

from flexkv.actors.actor import Supervisor
from flexkv.common.errors import InvariantError


async def raises(error: Exception) -> None:
    """Raise."""
    raise error


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError(1), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")]
)
async def test_a_session_that_raises_ends_alone(error: Exception) -> None:
    """Whatever it raises, the others go on, and the engine does not fail."""
    failures: list[BaseException] = []
    supervisor = Supervisor(failures.append)
    await supervisor.start()
    other = supervisor.spawn_session("other", asyncio.sleep(3600))
    await supervisor.spawn_session("session", raises(error))
    await asyncio.sleep(0)
    assert not failures
    assert not other.done()
    other.cancel()
    await supervisor.stop()
    assert not failures


async def test_a_broken_law_in_a_session_ends_the_engine() -> None:
    """The state of the engine is wrong then: nobody should be served with it."""
    failures: list[BaseException] = []
    supervisor = Supervisor(failures.append)
    await supervisor.start()
    supervisor.spawn_session("session", raises(InvariantError("broken")))
    await supervisor.stop()
    assert isinstance(failures[0], InvariantError)


async def test_any_other_task_that_raises_ends_the_engine() -> None:
    """Others may wait for its results for ever."""
    failures: list[BaseException] = []
    supervisor = Supervisor(failures.append)
    await supervisor.start()
    supervisor.spawn("request", raises(ValueError("x")))
    await supervisor.stop()
    assert isinstance(failures[0], ValueError)
