"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "flexkv").rglob("*.py"))
EVERYTHING = [
    *SOURCES,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    *sorted((ROOT / "ext").glob("*.[ch]")),
]

FILE_LINES_MAX, FUNCTION_LINES_MAX, PARAMETERS_MAX, COLUMNS_MAX = 500, 70, 6, 100

FLOORS = [
    {"common"},
    {"process", "index"},
    {"graph"},
    {"observe", "links"},
    {"mover"},
    {"io", "trace", "settings"},
    {"actors"},
    {"cluster"},
    {"tiers"},
    {"engine"},
    {"front"},
    {"server"},
    {"figures", "kvmanager", "metrics"},
    {"integration", "testing"},
    {"cli"},
]
"""The lowest floor comes first. A file may import from its own floor and from those below."""

PURE = {"common", "index", "graph"}
IMPURE_MODULES = {"asyncio", "os", "time", "random", "threading", "cuda", "torch", "socket"}
SPAWNERS = {"create_task", "ensure_future", "gather", "shield"}


def name_of(path: Path) -> str:
    """Return a file's path relative to the repository's root."""
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """Return the folder or top-level module of the package that a file belongs to."""
    return path.relative_to(ROOT / "flexkv").parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, including those for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_files_are_short_and_narrow(path: Path) -> None:
    """A file has at most 500 lines, of at most 100 columns."""
    lines = path.read_text().splitlines()
    assert len(lines) <= FILE_LINES_MAX
    assert [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS_MAX] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_short_with_few_parameters(path: Path) -> None:
    """A function has at most 70 lines, and 6 parameters besides self."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < FUNCTION_LINES_MAX, node.name
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [a for a in arguments if a.arg not in ("self", "cls")]
            commands = part_of(path) == "cli"  # a command's parameters are its options
            assert commands or len(named) <= PARAMETERS_MAX, node.name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    """No file imports from a floor above its own."""
    floor_of = {part: number for number, floor in enumerate(FLOORS) for part in floor}
    if part_of(path) == "__init__":
        return
    own = floor_of[part_of(path)]
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "flexkv" and len(parts) > 1 and parts[1] in floor_of:
            assert floor_of[parts[1]] <= own, name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_pure_folders_import_nothing_impure(path: Path) -> None:
    """Pure folders import no event loop, clock, randomness, threads, sockets, OS or device."""
    if part_of(path) in PURE:
        assert not {name.split(".")[0] for name in imports_of(path)} & IMPURE_MODULES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_actors_import_ports_never_adapters(path: Path) -> None:
    """Actors import the ports of flexkv.io, and no adapter."""
    if part_of(path) == "actors":
        adapters = [n for n in imports_of(path) if n.startswith("flexkv.io") and ".ports" not in n]
        assert adapters in ([], ["flexkv.io"])


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_tasks_are_spawned_in_one_place(path: Path) -> None:
    """Only the supervisor creates tasks; a test kit may use a task group of its own."""
    if name_of(path) == "flexkv/actors/supervisor.py" or part_of(path) in ("testing", "cli"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in SPAWNERS, f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_log_by_loggers_that_never_raise(path: Path) -> None:
    """No module uses structlog's own logger, which raises what its sink raises."""
    if name_of(path) != "flexkv/observe/logs.py":
        assert "structlog.get_logger" not in path.read_text()


def test_only_one_broad_except() -> None:
    """Only the actor boundary has a broad `except`; all other code names the errors it catches."""
    broad = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type.id if isinstance(node.type, ast.Name) else None
                reraises = isinstance(node.body[-1], ast.Raise)
                if (
                    node.type is None
                    or caught == "Exception"
                    or (caught == "BaseException" and not reraises)
                ):
                    broad.append(name_of(path))
    assert broad == ["flexkv/actors/supervisor.py"]


def test_importing_flexkv_does_nothing() -> None:
    """Importing flexkv loads no torch, numpy or networkx."""
    check = (
        "import sys, flexkv; print([m for m in ('torch', 'numpy', 'networkx') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=name_of)
def test_every_test_states_its_law(path: Path) -> None:
    """Each test has a docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
            "test"
        ):
            assert ast.get_docstring(node), node.name
