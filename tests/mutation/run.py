"""Changes the source in small ways, one at a time, and reports which changes no test notices.

    make mutants                                         200 changes, by the seed 1
    make mutants ARGS="--sample 50 --seed 7"
    make mutants ARGS="--only 'flexkv/graph/*' --sample 0"    every change of these files

`targets.toml` says which tests check which files, `survivors.toml` which changes may survive, and
why. A change is killed when a test fails, when the tests take far longer than without it, or when
nothing can be imported any more. The exit status is 1 if a survivor is not listed.

mutmut and cosmic-ray do not suit us: they draw no samples, choose the tests by one command or by a
run of the whole suite, and use one interpreter, while the files for vLLM need another one.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import psutil

from .mutants import Mutant, mutants_of

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COPIED = ["flexkv", "tests", "benchmarks", "examples", "docs", "scripts", "requirements"]
KILLED_MIN = 0.9
TIMEOUT_TIMES, TIMEOUT_MORE_S = 2.0, 20.0
UNCHANGED_MAX_S = 1800.0
MEMORY_MAX_BYTES = 8 << 30
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Target:
    """Source files, the tests that check them (the quickest first), and the venv of the tests."""

    files: tuple[str, ...]
    tests: tuple[str, ...]
    venv: str
    leaves_out: tuple[str, ...] = ()

    def has(self, file: str) -> bool:
        """Return whether a file matches one of the patterns."""
        return any(fnmatch(file, pattern) for pattern in self.files)


class Outcome(NamedTuple):
    """The result of the tests ("passed", "failed", "timeout"), their time, and the failed test."""

    word: str
    seconds: float
    by: str = ""


@dataclass(frozen=True)
class Survivor:
    """A listed change that no test can notice, or needs to."""

    file: str
    before: str
    after: str
    reason: str

    def covers(self, mutant: Mutant) -> bool:
        """Return whether this entry is about the change, on whatever line that is now."""
        return fnmatch(mutant.file, self.file) and (self.before, self.after) == (
            mutant.before,
            mutant.after,
        )


def load_targets() -> list[Target]:
    """Return the targets of `targets.toml`; a file belongs to the first one that has it."""
    entries = tomllib.loads((HERE / "targets.toml").read_text())["target"]
    return [
        Target(
            tuple(entry["files"]),
            tuple(entry["tests"]),
            entry.get("venv", ".venv"),
            tuple(entry.get("leaves_out", ())),
        )
        for entry in entries
    ]


def load_environment() -> dict[str, str]:
    """Return the environment variables that shorten the tests with many samples."""
    entries: dict[str, str] = tomllib.loads((HERE / "targets.toml").read_text())["environment"]
    return entries


def load_survivors() -> list[Survivor]:
    """Return the changes that may survive, from `survivors.toml`."""
    entries = tomllib.loads((HERE / "survivors.toml").read_text()).get("survivor", [])
    return [Survivor(**entry) for entry in entries]


def target_of(file: str, targets: list[Target]) -> Target | None:
    """Return the target of a file, or None if it has none."""
    found = next((target for target in targets if target.has(file)), None)
    return None if found and any(fnmatch(file, each) for each in found.leaves_out) else found


def files_of(targets: list[Target]) -> list[str]:
    """Return all files that the run may change."""
    every = (str(path.relative_to(ROOT)) for path in (ROOT / "flexkv").rglob("*.py"))
    return sorted(file for file in every if target_of(file, targets) is not None)


class Tree:
    """A worker's copy of the repository, in which one change is made at a time."""

    def __init__(self, parent: Path) -> None:
        # Processes that a test leaves running become children of this one, which kills them.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.folder = Path(tempfile.mkdtemp(dir=parent))
        unwanted = shutil.ignore_patterns("__pycache__", ".hypothesis")
        for name in COPIED:
            shutil.copytree(ROOT / name, self.folder / name, ignore=unwanted, symlinks=True)
        for name in ("pyproject.toml", "Makefile", "README.md", "ARCHITECTURE.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, self.folder / name)
        subprocess.run([sys.executable, "-m", "compileall", "-q", "flexkv"], cwd=self.folder)

    def run(self, target: Target, mutant: Mutant | None, timeout_s: float) -> Outcome:
        """Run the tests of a target, with one change or with none, and return the outcome."""
        if mutant is None:
            return self._test(target, timeout_s)
        file = self.folder / mutant.file
        source = file.read_bytes()
        for cached in file.parent.glob(f"__pycache__/{file.stem}.*"):
            cached.unlink()
        try:
            file.write_bytes(mutant.apply(source))
            return self._test(target, timeout_s)
        finally:
            file.write_bytes(source)

    def _test(self, target: Target, timeout_s: float) -> Outcome:
        begin_s = time.monotonic()
        scratch = self.folder / "t"
        scratch.mkdir()
        command = [str(ROOT / target.venv / "bin/python"), "-m", "pytest", "-x", "-q", "--tb=line"]
        command += ["-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={scratch / 'b'}"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "h"),
            "TMPDIR": str(scratch),
            **load_environment(),
        }
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *target.tests],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_limit_memory,
            )
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                status = None
            _end_descendants()
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)
        seconds = time.monotonic() - begin_s
        if status is None:
            return Outcome("timeout", seconds, "a timeout")
        if status == 5:
            raise RuntimeError(f"no tests in {target.tests}")
        if status == 0:
            return Outcome("passed", seconds)
        said = (self.folder / "log").read_text(errors="replace")
        by = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return Outcome("failed", seconds, by[-1] if by else f"pytest's status {status}")


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MAX_BYTES, MEMORY_MAX_BYTES))


def _end_descendants() -> None:
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        with suppress(ChildProcessError):
            os.waitpid(-1, 0)


_tree: list[Tree] = []


def _begin(parent: Path) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # die with the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tree.append(Tree(parent))


def _run(target: Target, mutant: Mutant, timeout_s: float) -> Outcome:
    return _tree[0].run(target, mutant, timeout_s)


def _run_unchanged(target: Target) -> Outcome:
    """Return the outcome of the tests without a change; raise if they fail twice."""
    for _ in range(2):
        outcome = _tree[0].run(target, None, UNCHANGED_MAX_S)
        if outcome.word == "passed":
            return outcome
    log = (_tree[0].folder / "log").read_text(errors="replace")
    raise RuntimeError(f"the tests of {target.files} fail without a change:\n{log[-4000:]}")


def run_all(
    mutants: list[Mutant], targets: list[Target], workers: int, more_s: float = TIMEOUT_MORE_S
) -> dict[Mutant, Outcome]:
    """Run the tests of each change, and return the outcomes."""
    outcomes: dict[Mutant, Outcome] = {}
    wanted = {mutant: target for mutant in mutants if (target := target_of(mutant.file, targets))}
    with (
        tempfile.TemporaryDirectory(prefix="m-") as parent,
        ProcessPoolExecutor(workers, get_context("spawn"), _begin, (Path(parent),)) as pool,
    ):
        try:
            alone = {target: pool.submit(_run_unchanged, target) for target in set(wanted.values())}
            for target, future in alone.items():
                print(
                    f"{future.result().seconds:6.1f} s without a change: {' '.join(target.files)}"
                )
            running = {
                pool.submit(
                    _run, target, mutant, more_s + TIMEOUT_TIMES * alone[target].result().seconds
                ): mutant
                for mutant, target in wanted.items()
            }
            for future in as_completed(running):
                mutant = running[future]
                outcomes[mutant] = outcome = future.result()
                said = f"{mutant.file}:{mutant.line}: {mutant.before}  ->  {mutant.after}"
                word = f"killed by {outcome.by}" if outcome.by else "SURVIVED"
                print(f"{len(outcomes):4} {outcome.seconds:6.1f} s {said}\n{word:>18}", flush=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return outcomes


def report(outcomes: dict[Mutant, Outcome], survivors: list[Survivor]) -> int:
    """Print the outcomes, and return the exit status."""
    counts: Counter[tuple[str, str]] = Counter()
    unlisted = []
    print(f"\n{'':28} killed  of which by timeout  survived  of which listed")
    for mutant, (outcome, *_) in sorted(outcomes.items()):
        part = mutant.file if mutant.file.count("/") < 2 else str(Path(mutant.file).parent)
        listed = [each for each in survivors if each.covers(mutant)]
        for row in (part, "all"):
            counts[row, outcome] += 1
            counts[row, "listed"] += outcome == "passed" and bool(listed)
        if outcome == "passed" and not listed:
            unlisted.append(mutant)
    for row in [*sorted({row for row, _ in counts} - {"all"}), "all"]:
        failed, timeout, passed, listed_too = (
            counts[row, name] for name in ("failed", "timeout", "passed", "listed")
        )
        print(f"{row:28} {failed + timeout:6} {timeout:20} {passed:9} {listed_too:16}")
    killed = 1 - counts["all", "passed"] / max(1, len(outcomes))
    print(f"\n{100 * killed:.1f} % killed; {100 * KILLED_MIN:.0f} % are wanted")
    for mutant in unlisted:
        print(f"\nnot listed: {mutant.file}:{mutant.line}")
        print(f"  - {mutant.before}\n  + {mutant.after}")
    return int(bool(unlisted) or killed < KILLED_MIN)


def main(words: list[str] | None = None) -> int:
    """Choose changes, run the tests on each, and report the outcomes."""
    parser = argparse.ArgumentParser(prog="make mutants")
    parser.add_argument("--sample", type=int, default=200, help="how many changes; 0 for all")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--only", default="*", help="a pattern of files")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="only show the changes")
    options = parser.parse_args(words)
    targets = load_targets()
    every = [
        mutant
        for file in files_of(targets)
        if fnmatch(file, options.only)
        for mutant in mutants_of(ROOT, file)
    ]
    count = min(options.sample or len(every), len(every))
    mutants = random.Random(options.seed).sample(every, count)
    print(f"{count} of {len(every)} changes, seed {options.seed}")
    if options.list:
        for mutant in sorted(mutants):
            print(f"{mutant.file}:{mutant.line}: {mutant.before}  ->  {mutant.after}")
        return 0
    begin_s = time.monotonic()
    outcomes = run_all(mutants, targets, options.workers)
    status = report(outcomes, load_survivors())
    print(f"{time.monotonic() - begin_s:.0f} s")
    return status
