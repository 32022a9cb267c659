"""The table of `docs/vllm.md`: what FlexKV serves under which vLLM, as runs of the tests show.

A test that shows a row has the mark `support(kind, name, status, note)`, where the kind is one of
`KINDS` and the status "served" (the default) or "refused". Several tests may show one row; one of
them has its note. `NOT_TRIED` has the rows that no test shows.

    make test-vllm ARGS=--write-support     records each such test's outcome, and writes the table
    python -m tests.vllm.support            writes the table from what is recorded and declared
    pytest tests/test_support.py            compares it with these

`docs/vllm-support.jsonl` has a line for each test and version of vLLM. A run replaces the lines of
the tests that it runs; a row of which nothing is recorded is "not tried". `--support-log=FILE`
takes outcomes from the output of an earlier `pytest -v` instead:
`pytest --collect-only -m "" tests/vllm --write-support --support-log=FILE`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Generator, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT, REPORT = ROOT / "docs/vllm.md", ROOT / "docs/vllm-support.jsonl"
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
KINDS = {"model": "models", "cache": "kinds of KV cache", "feature": "features"}
STATUSES = ("served", "refused", "not tried")
PROOFS = ("engine", "scheduler", "tensors")
"""What runs in the test of a served row; the first is the best."""
SCHEDULER = {"test_upstream"}
TENSORS = {
    "test_arrivals", "test_backlog", "test_deadlines", "test_drafts", "test_extra_config",
    "test_far_fetches", "test_group_identity", "test_groups", "test_identity", "test_kernel_blocks",
    "test_kv_events", "test_layer_loads", "test_pools", "test_prompts", "test_refusals",
    "test_request_state", "test_scheduler_faults", "test_scheduler_side", "test_smaller_blocks",
    "test_versions", "test_worker_hooks",
}  # fmt: skip
"""The test files of `tests/vllm` that start no engine."""


class Row(NamedTuple):
    """One line of the table."""

    kind: str
    name: str
    status: str = "served"
    note: str = ""


class Case(NamedTuple):
    """The outcome of a test, and the names of the rows that it shows."""

    vllm: str
    test: str
    outcome: str
    on: str
    shows: tuple[str, ...]


NOT_TRIED = (
    Row("model", "mixture of experts (Mixtral, Qwen3-MoE)", "not tried",
        "their KV cache is that of a plain model"),
    Row("model", "with images or sounds (Qwen2-VL)", "not tried",
        "no run; keys of their prompts are tested over vLLM's own hashes"),
    Row("feature", "LoRA adapters", "not tried", "no run; keys of their prompts are tested"),
    Row("feature", "MTP of models with MLA (DeepSeek V3), drafts of models with states",
        "not tried", "vLLM caches no prefixes of the former on a CPU without AMX, and runs the"
        " latter only with Triton"),
    Row("feature", "GPUs", "not tried",
        "no run under vLLM; FlexKV itself has run on one: see the README"),
    Row("feature", "quantised KV cache (`fp8`, `fp8_e4m3`, `fp8_e5m2`)", "not tried"),
    Row("feature", "streaming input (resumable requests)", "not tried"),
    Row("feature", "disaggregated prefill beside another connector", "not tried"),
)  # fmt: skip


def proof_of(test: str) -> str:
    """Return what runs in a test, by its file."""
    file = Path(test.partition("::")[0])
    if file.stem in SCHEDULER:
        return "scheduler"
    return "tensors" if file.stem in TENSORS or "vllm" not in file.parts else "engine"


# -- what tests declare, and what runs have shown -----------------------------------------------


def declared() -> dict[str, Row]:
    """Return the rows by name: those that tests declare, and the untried ones."""
    rows: dict[str, Row] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if "support(" not in (text := path.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and _is_mark(node.func):
                row = Row(*(ast.literal_eval(argument) for argument in node.args))
                known = rows.setdefault(row.name, row)
                if row[:3] != known[:3] or (row.note and known.note not in ("", row.note)):
                    raise ValueError(f"{path}: {row} is also declared as {known}")
                rows[row.name] = known._replace(note=known.note or row.note)
    return {**rows, **{row.name: row for row in NOT_TRIED if row.name not in rows}}


def _is_mark(function: ast.expr) -> bool:
    """Return whether a call is `support(…)` or `pytest.mark.support(…)`."""
    name = getattr(function, "attr", getattr(function, "id", ""))
    return bool(name == "support")


def recorded() -> list[Case]:
    """Return the outcomes that runs have recorded."""
    lines = REPORT.read_text().splitlines() if REPORT.exists() else []
    cases = [Case(**json.loads(line)) for line in lines]
    return [case._replace(shows=tuple(case.shows)) for case in cases]


def exists(test: str) -> bool:
    """Return whether there is a test function of this name, whatever its parameters."""
    file, _, name = test.partition("[")[0].partition("::")
    path = ROOT / file
    return path.exists() and f"def {name}(" in path.read_text()


def record(cases: Iterable[Case]) -> None:
    """Replace the recorded outcomes of tests, forget tests that are gone, and write the table."""
    of_test = {case[:2]: case for case in [*recorded(), *cases] if exists(case.test)}
    lines = [json.dumps(of_test[key]._asdict(), ensure_ascii=False) for key in sorted(of_test)]
    REPORT.write_text("".join(f"{line}\n" for line in lines))
    text = DOCUMENT.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOCUMENT.write_text("\n".join([before, *table(declared(), recorded()), after]))


# -- the table ----------------------------------------------------------------------------------


def written() -> list[str]:
    """Return the table's lines in the document."""
    text = DOCUMENT.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()


def table(rows: dict[str, Row], cases: Iterable[Case]) -> list[str]:
    """Return the lines of the table, by kind; within each kind served rows come first."""
    of_row: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        for name in case.shows:
            of_row.setdefault((name, case.vllm), []).append(case)
    versions = sorted(
        {version for _, version in of_row}, key=lambda text: [int(part) for part in text.split(".")]
    )
    lines = ["| " + " | ".join(["vLLM", *versions, ""]) + " |", "|---" * (len(versions) + 2) + "|"]
    for kind, title in KINDS.items():
        lines.append(f"| **{title}** |" + " |" * (len(versions) + 1))
        of_kind = [row for row in rows.values() if row.kind == kind]
        for row in sorted(of_kind, key=_place):
            cells = [_cell(row, of_row.get((row.name, version), [])) for version in versions]
            lines.append(f"| {' | '.join([row.name, *cells, row.note])} |")
    return lines


def _place(row: Row) -> tuple[int, str]:
    """Return what rows are sorted by."""
    return STATUSES.index(row.status), row.name.lstrip("`/").lower()


def _cell(row: Row, cases: Iterable[Case]) -> str:
    """Return what runs with one version of vLLM have shown of a row."""
    ran = [case for case in cases if case.outcome != "skipped"]
    if not ran:
        return "*not tried*"
    if any(case.outcome != "passed" for case in ran):
        return "*failed*"
    if row.status != "served":
        return f"*{row.status}*"
    return f"*served* ({min((proof_of(case.test) for case in ran), key=PROOFS.index)})"


# -- pytest's hooks -----------------------------------------------------------------------------

_seen: dict[str, Case] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that record outcomes."""
    parser.addoption(
        "--write-support", action="store_true", help="record outcomes for the table of docs/vllm.md"
    )
    parser.addoption("--support-log", type=Path, help="take outcomes from this output of pytest -v")


def vllm_version() -> str:
    """Return the version of vLLM that is imported here, or "" if there is none."""
    try:
        return metadata.version("vllm").partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def _see(item: pytest.Item, outcome: str, on: datetime) -> None:
    """Record the outcome of a test that shows some rows."""
    shows = tuple(sorted({mark.args[1] for mark in item.iter_markers("support")}))
    if shows and (version := vllm_version()):
        _seen[item.nodeid] = Case(version, item.nodeid, outcome, f"{on:%Y-%m-%d}", shows)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Record the outcome of a test, if that was asked for."""
    report = yield
    if item.config.getoption("--write-support") and (report.when == "call" or not report.passed):
        _see(item, report.outcome, datetime.now(UTC))
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    """Record the outcomes that a log tells, if one was given."""
    log = session.config.getoption("--support-log")
    if log is None:
        return
    line = re.compile(r"^(tests/.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)
    outcomes = {test: word.lower() for test, word in line.findall(log.read_text())}
    on = datetime.fromtimestamp(log.stat().st_mtime, UTC)
    for item in session.items:
        if item.nodeid in outcomes:
            _see(item, outcomes[item.nodeid], on)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was recorded, if that was asked for."""
    if session.config.getoption("--write-support"):
        record(_seen.values())


if __name__ == "__main__":
    record([])
