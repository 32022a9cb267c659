"""The examples run, and say what they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_prefixes_of_a_transformers_model_are_kept(tmp_path: Path) -> None:
    """Equal tokens with and without; a second process finds what the first one left on SSD."""
    pytest.importorskip("transformers")
    command = [sys.executable, "examples/transformers_prefix_cache.py", "--turns", "2"]
    command += ["--tokens", "40", "--ssd", str(tmp_path)]
    for loaded in (["0", "32"], ["32", "79"]):  # whole blocks; one token is computed
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rows = [line.split() for line in done.stdout.splitlines() if line.endswith(" yes")]
        assert [row[2] for row in rows] == loaded
