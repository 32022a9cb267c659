"""Whether Mooncake is there, without loading it into this process."""

from __future__ import annotations

import functools
import re
import subprocess

from flexkv.common.errors import BackendUnavailableError
from flexkv.mover.life import mover_command

_CHECK_S = 60.0


@functools.cache
def check_installed(backend: str = "Mooncake Store") -> None:
    """Check that a mover can load Mooncake, for a backend that needs it.

    Raises:
        BackendUnavailableError: Mooncake, or a library that it needs, is not installed.
    """
    command = mover_command("--check")
    try:
        checked = subprocess.run(command, capture_output=True, timeout=_CHECK_S, check=False)
    except subprocess.TimeoutExpired as error:
        why = f"a process that loads it does not end within {_CHECK_S:g} s"
        raise BackendUnavailableError(backend, why) from error
    if not checked.returncode:
        return
    said = checked.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    why = "Mooncake is not installed: pip install 'flexkv[mooncake]'"
    if re.search(r"No module named 'mooncake[.']", said) is None:
        why = f"Mooncake cannot be loaded: {said}"
        if "libibverbs" in said:
            why = f"{why}; install the package libibverbs1"
    raise BackendUnavailableError(backend, why)
