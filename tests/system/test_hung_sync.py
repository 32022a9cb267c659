"""Tests that shutting down does not wait for a disk that never ends a sync."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from flexkv.io.ssd.files import StripedFiles
from flexkv.tiers import ledger

from .conftest import PER_BLOCK, MakeManager, kv_caches, slots_of

PATIENCE_S = 30.0


@pytest.fixture
def syncing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Make each sync of the SSD files hang; yield the event that is set once one does."""
    begun, healed = threading.Event(), threading.Event()

    def hang(files: StripedFiles) -> None:
        begun.set()
        healed.wait()

    monkeypatch.setattr(StripedFiles, "sync", hang)
    yield begun
    healed.set()


@pytest.mark.parametrize("entries", [512, 0], ids=["uring", "threads"])
def test_a_sync_that_hangs_does_not_hold_the_shutdown(
    syncing: threading.Event,
    make_manager: MakeManager,
    entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shutdown returns while a sync still hangs, and the directory can be used again."""
    monkeypatch.setattr(ledger, "FINISH_S", 0.5)
    manager = make_manager(iouring_entries=entries, shutdown_flush_s=0.1)
    manager.start()
    manager.register_kv_caches(kv_caches())
    manager.wait([manager.put_async(np.arange(4 * PER_BLOCK), slots_of(range(4)))])
    ending = threading.Thread(target=manager.shutdown, daemon=True)
    ending.start()
    assert syncing.wait(PATIENCE_S)
    ending.join(PATIENCE_S)
    assert not ending.is_alive()
    again = make_manager()
    again.start()
    again.shutdown()
