"""The mutation run makes the right changes, and reports those that no test notices."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutation import run as mutation
from tests.mutation.mutants import mutants_of

CHANGES = [
    ("a < b", {"a <= b"}),
    ("a is not b", {"a is b"}),
    ("a not  in b", {"a in b"}),
    ("a < b == c", {"a <= b == c", "a < b != c"}),
    ("a and b and c", {"a or b and c", "a and b or c"}),
    ("not a", {"(a)"}),
    ("-a", {"(a)"}),
    ("a + b * c", {"a - b * c", "a + b // c"}),
    ("a + 'text'", set()),
    ("7", {"(7 + 1)"}),
    ("True", {"False"}),
    ("max(a, b)", {"min(a, b)"}),
    ("a if b else c", {"a if (not (b)) else c"}),
    ("a if b == c else d", {"a if b != c else d"}),
    ("[a for a in b if c]", {"[a for a in b if (not (c))]"}),
    ("f'{a + 1}'", set()),
]

STATEMENTS = [
    ("ä = 'ä'; a.b(c)", {"ä = 'ä'; pass"}),
    ("await a()", {"pass"}),
    ("log.info('it', left=a)", set()),
    ("a.b = c", {"pass"}),
    ("a.b: int = c", {"pass"}),
    ("a: int = c", set()),
    ("a += b", {"a -= b"}),
    ("del a[b]", {"pass"}),
    ("raise ValueError(1)", {"pass"}),
    ("return a", {"return None"}),
    ("return None", set()),
    ("assert a < b", set()),
    ("if a: b = c", {"if (not (a)): b = c"}),
    ("while a: break", {"while a: continue"}),
]


def afters(folder: Path, source: str) -> set[str]:
    """Return the changed lines of a source, having checked that each result is valid Python."""
    (folder / "source.py").write_text(source)
    found = mutants_of(folder, "source.py")
    for mutant in found:
        ast.parse(mutant.apply(source.encode()))
    return {mutant.after for mutant in found}


@pytest.mark.parametrize(("expression", "expected"), CHANGES)
def test_expressions_are_changed(expression: str, expected: set[str], tmp_path: Path) -> None:
    """Each operator and each number has its mutants, and strings have none."""
    assert afters(tmp_path, f"x = {expression}\n") == {f"x = {each}" for each in expected}


@pytest.mark.parametrize(("statement", "expected"), STATEMENTS)
def test_statements_are_changed(statement: str, expected: set[str], tmp_path: Path) -> None:
    """Statements without a value are dropped, but not log lines and assertions."""
    found = afters(tmp_path, f"async def f():\n    {statement}\n")
    assert found - {"return (1 + 1)"} == expected


def test_annotations_decorators_and_bases_are_left_alone(tmp_path: Path) -> None:
    """Annotations, decorators, bases and `__repr__` have no mutants."""
    source = """
Either: TypeAlias = A | B

@decorated(1)
class C(Base, frozen=True):
    a: Literal[1]

    def f(self, a: Literal[2]) -> Literal[3]: ...
    def __repr__(self):
        return str(1 + 1)
"""
    assert afters(tmp_path, source) == set()


def test_targets_are_there() -> None:
    """Every file of the core has a target, and every test that a target names exists."""
    targets = mutation.load_targets()
    files = mutation.files_of(targets)
    for target in targets:
        assert any(mutation.target_of(file, targets) is target for file in files), target.files
        missing = [name for name in target.tests if not (mutation.ROOT / name).exists()]
        assert not missing
        assert all(part for part in target.leaves_out)
    for folder in ("index", "graph", "actors", "server"):
        for path in (mutation.ROOT / "flexkv" / folder).rglob("*.py"):
            assert str(path.relative_to(mutation.ROOT)) in files


def test_listed_survivors_are_changes_that_are_made() -> None:
    """Every listed survivor is a mutant of the present source, and has a reason."""
    every = [
        mutant
        for file in mutation.files_of(mutation.load_targets())
        for mutant in mutants_of(mutation.ROOT, file)
    ]
    for survivor in mutation.load_survivors():
        assert any(survivor.covers(mutant) for mutant in every), survivor
        assert len(survivor.reason) > 20, survivor


def test_each_change_is_made_alone_and_judged() -> None:
    """A mutant is killed by a test that fails or hangs, and survives tests that pass."""
    file, other = "flexkv/common/extents.py", "flexkv/actors/health.py"
    targets = [
        mutation.Target((file,), ("tests/unit/test_extents.py",), ".venv"),
        mutation.Target((other,), ("tests/unit/test_cpus.py",), ".venv"),
    ]
    failing = next(each for each in mutants_of(mutation.ROOT, file) if "return None" in each.after)
    hanging = replace(failing, text="next(filter(None, iter(int, 1)))", after="never ends")
    unseen = mutants_of(mutation.ROOT, other)[0]
    outcomes = mutation.run_all([failing, hanging, unseen], targets, 1, more_s=1.0)
    assert outcomes[failing].by.startswith("tests/unit/test_extents.py::")
    assert [outcomes[each].word for each in (failing, hanging, unseen)] == [
        "failed", "timeout", "passed",
    ]  # fmt: skip


def test_a_survivor_that_is_not_listed_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The status is 1 if a survivor is not listed, or if too few mutants are killed, else 0."""
    mutants = mutants_of(mutation.ROOT, "flexkv/common/extents.py")[:10]
    outcomes = dict.fromkeys(mutants, mutation.Outcome("failed", 1.0))
    assert mutation.report(outcomes, []) == 0
    survivor = mutants[3]
    outcomes[survivor] = mutation.Outcome("passed", 1.0)
    assert mutation.report(outcomes, []) == 1
    assert survivor.after in capsys.readouterr().out
    listed = mutation.Survivor("flexkv/*", survivor.before, survivor.after, "it makes no odds")
    assert mutation.report(outcomes, [listed]) == 0
    outcomes[mutants[4]] = mutation.Outcome("passed", 1.0)
    also = mutation.Survivor("flexkv/*", mutants[4].before, mutants[4].after, "nor does this")
    assert mutation.report(outcomes, [listed, also]) == 1  # 80 % are killed
