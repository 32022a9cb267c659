"""Mount file systems that one of our own processes serves, where the machine permits it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 20.0


class Disk:
    """A mounted file system whose failures the test controls."""

    def __init__(self, mounted: Path, control: Path) -> None:
        self.mounted, self.control = mounted, control

    def suffers_from(self, words: str) -> None:
        """Set what fails or hangs from now on, by the words of `failing_disk`; none for nothing."""
        new = self.control.with_suffix(".new")
        new.write_text(words)
        new.rename(self.control)


def missing() -> str:
    """Return what this machine lacks to mount a file system of ours; empty if nothing."""
    if not Path("/dev/fuse").exists() or shutil.which("fusermount3") is None:
        return "needs FUSE"
    return ""


@contextmanager
def mounted_by(program: str, at: Path, *words: object) -> Iterator[None]:
    """Mount a file system, and unmount it afterwards.

    Args:
        program: the module that serves it in the foreground: `python -m PROGRAM AT WORDS`.
        at: the mount point, which is created.
        words: further arguments of the program.

    Raises:
        RuntimeError: this process may not mount.
    """
    at.mkdir()
    command = [sys.executable, "-m", program, str(at), *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT) as serving:
        until_s = time.monotonic() + PATIENCE_S
        while not at.is_mount():
            if serving.poll() is not None or time.monotonic() > until_s:
                serving.kill()
                raise RuntimeError(f"{at} cannot be mounted")
            time.sleep(0.01)
        try:
            yield
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(at)], check=True)


@contextmanager
def mounted_disk(folder: Path) -> Iterator[Disk]:
    """Mount a `Disk` in a folder, and unmount it afterwards; skip the test if not allowed."""
    if missing():
        pytest.skip("this machine has no FUSE")
    directory, disk = folder / "real", Disk(folder / "mounted", folder / "control")
    directory.mkdir()
    disk.suffers_from("")
    with ExitStack() as opened:
        try:
            opened.enter_context(
                mounted_by("tests.system.failing_disk", disk.mounted, directory, disk.control)
            )
        except RuntimeError:
            pytest.skip("this process may not mount")
        opened.callback(disk.suffers_from, "")  # a hanging disk could not be unmounted
        yield disk
