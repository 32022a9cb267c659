"""A scrubber on a disk that hangs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from flexkv.io.ssd.files import StripedFiles
from flexkv.tiers.scrub import Scrubber

PATIENCE_S = 20.0


def test_a_read_that_hangs_does_not_hold_the_close(tmp_path: Path) -> None:
    """Close does not wait for a read that hangs; its memory is released when the read ends."""
    files = StripedFiles.open([tmp_path / "ssd"], 4, 4096)
    no_ledger: Any = None
    scrubber = Scrubber(files, np.zeros(4, np.uint64), no_ledger, 1e6, [4096])
    healed, released = threading.Event(), threading.Event()
    close_reader = scrubber._reader.close
    vars(scrubber._reader)["close"] = lambda: (close_reader(), released.set())
    scrubber._thread.submit(healed.wait)
    closing = threading.Thread(target=scrubber.close, daemon=True)
    closing.start()
    closing.join(PATIENCE_S)
    try:
        assert not closing.is_alive()
        assert not released.is_set()
    finally:
        healed.set()
    assert released.wait(PATIENCE_S)
    scrubber.close()
    files.close()
