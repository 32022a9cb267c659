"""Mounts the file system of `failing_disk.py`, where the machine permits."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 20.0


class Disk:
    """A mounted file system, and what it suffers from."""

    def __init__(self, mounted: Path, control: Path) -> None:
        self.mounted, self.control = mounted, control

    def suffers_from(self, words: str) -> None:
        """Let it fail, or hang, from now on."""
        new = self.control.with_suffix(".new")
        new.write_text(words)
        new.rename(self.control)


@contextmanager
def mounted_disk(folder: Path) -> Iterator[Disk]:
    """Mount one in a folder, and unmount it at last; skip the test where that is not allowed."""
    if not Path("/dev/fuse").exists() or shutil.which("fusermount3") is None:
        pytest.skip("this machine has no FUSE")
    mounted, directory, control = (folder / name for name in ("mounted", "real", "control"))
    mounted.mkdir()
    directory.mkdir()
    disk = Disk(mounted, control)
    disk.suffers_from("")
    command = [sys.executable, "-m", "tests.system.failing_disk"]
    with subprocess.Popen(
        [*command, str(mounted), str(directory), str(control)], cwd=ROOT
    ) as serving:
        until = time.monotonic() + PATIENCE_S
        while not mounted.is_mount():
            if serving.poll() is not None or time.monotonic() > until:
                serving.kill()
                pytest.skip("this process may not mount")
            time.sleep(0.01)
        yield disk
        disk.suffers_from("")
        subprocess.run(["fusermount3", "-u", "-z", str(mounted)], check=True)
