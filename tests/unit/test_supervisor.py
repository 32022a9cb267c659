"""A session's failure ends that session; a failure of the engine's state ends the engine."""

from __future__ import annotations

import asyncio

import pytest

from flexkv.actors.supervisor import Supervisor
from flexkv.common.errors import InvariantError


async def raises(error: Exception) -> None:
    """Raise the error."""
    raise error


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError(1), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")]
)
async def test_a_session_that_raises_ends_alone(error: Exception) -> None:
    """A session that raises ends alone; other sessions and the engine go on."""
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
    """An InvariantError in a session ends the engine, since its state is wrong."""
    failures: list[BaseException] = []
    supervisor = Supervisor(failures.append)
    await supervisor.start()
    supervisor.spawn_session("session", raises(InvariantError("broken")))
    await supervisor.stop()
    assert isinstance(failures[0], InvariantError)


async def test_any_other_task_that_raises_ends_the_engine() -> None:
    """Any other task that raises ends the engine, as its waiters might wait for ever."""
    failures: list[BaseException] = []
    supervisor = Supervisor(failures.append)
    await supervisor.start()
    supervisor.spawn("request", raises(ValueError("x")))
    await supervisor.stop()
    assert isinstance(failures[0], ValueError)
