"""What obstore still holds when a put has ended, which no lent buffer may outlive."""

from __future__ import annotations

from typing import Any

import pytest

from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.process.foreign_calls import ForeignCalls


async def test_the_error_of_a_put_that_exists_holds_no_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """obstore drops the future of a put late: its error must not keep the frames of the put."""
    held: list[Any] = []
    hold = ForeignCalls.hold

    def holding(calls: ForeignCalls, thing: Any) -> Any:
        held.append(thing)
        return hold(calls, thing)

    store = open_store("memory://", {}, RemoteOptions())
    assert await store.put("name", [b"some bytes"])
    monkeypatch.setattr(ForeignCalls, "hold", holding)
    assert not await store.put("name", [b"others"])
    _, future = held
    assert future.exception() is not None
    assert future.exception().__traceback__ is None
    held.clear()
    del future
    await store.leave()
    store.close()
