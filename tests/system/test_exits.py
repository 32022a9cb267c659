"""Tests that a program ends within seconds and without errors, however it leaves a manager."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .exit_cases import CASES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Run all cases, and return the report of each, by name."""
    folder = tmp_path_factory.mktemp("exits")
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "tests/system/exit_cases.py", folder],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    return {case["name"]: case for case in told}


@pytest.mark.parametrize("name", CASES)
def test_a_program_ends(name: str, ended: dict[str, dict[str, Any]]) -> None:
    """A program ends with its status, and prints only a warning if nobody closed the manager."""
    assert ended[name]["faults"] == [], ended[name]
