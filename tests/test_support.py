"""The claims of the documents agree with the code and the tests."""

from __future__ import annotations

import re
from pathlib import Path

from flexkv.common.config import CacheConfig, ModelConfig, Settings
from flexkv.common.config_keys import facts_of
from tests.vllm import support

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_what_is_not_there_is_what_refuses_to_be_enabled() -> None:
    """The README's table has each key of a part that is not built once, and no other key."""
    refused = [
        name
        for model in (ModelConfig, CacheConfig, Settings)
        for name, field in model.model_fields.items()
        if facts_of(field).part
    ]
    _, _, section = README.partition("## What is there, and what is not\n")
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    told = {row[0]: (row[1], re.findall(r"`(\w+)`", row[2])) for row in rows[2:] if len(row) > 2}
    assert sorted(key for _, keys in told.values() for key in keys) == sorted(refused)
    assert all(state == "not there" for state, keys in told.values() if keys)


def test_every_figure_names_its_run() -> None:
    """Every figure of the README names its run by a letter that links to a results file."""
    _, _, section = README.partition("## Figures\n")
    section, _, _ = section.partition("\nHit rate")
    runs = dict(re.findall(r"\*\*(\w)\*\* is\s+\[`[^`]+`\]\(([^)]+)\)", section))
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    named = {row.rstrip(" |").rpartition("| ")[2] for row in rows}
    assert named == set(runs)
    assert all((ROOT / file).exists() for file in runs.values())


def test_the_support_table_is_what_runs_have_shown() -> None:
    """The table is made of the rows that tests declare and of the outcomes that runs recorded.

    `make test-vllm ARGS=--write-support` writes both, `python -m tests.vllm.support` the table.
    """
    assert support.written() == support.table(support.declared(), support.recorded())


def test_every_recorded_test_exists_and_has_passed() -> None:
    """What is recorded are tests that exist, show declared rows, and did not fail."""
    rows = support.declared()
    for case in support.recorded():
        assert support.exists(case.test), case
        assert rows.keys() >= set(case.shows), case
        assert case.outcome in ("passed", "skipped"), case


def test_every_row_has_a_known_kind_and_status() -> None:
    """Each row has a known kind and a known status; an untried row has no other."""
    rows = support.declared().values()
    assert {row.kind for row in rows} == set(support.KINDS)
    assert {row.status for row in rows} == set(support.STATUSES)
    assert all(row.status == "not tried" for row in support.NOT_TRIED)


def test_a_cell_names_the_best_proof_and_any_failure() -> None:
    """One failure makes a row failed; else its best test counts. Skipped tests show nothing."""
    row = support.Row("feature", "loads", note="on Mondays")

    def line(**outcomes: str) -> str:
        cases = [
            support.Case("0.9.0" if file == "test_old" else "0.10.0", f"tests/vllm/{file}.py::test",
                         outcome, "2026-11-30", ("loads",))
            for file, outcome in outcomes.items()
        ]  # fmt: skip
        return support.table({"loads": row}, cases)[-1]

    assert line(test_groups="passed") == "| loads | *served* (tensors) | on Mondays |"
    assert line(test_groups="passed", test_outputs="passed", test_upstream="passed") == (
        "| loads | *served* (engine) | on Mondays |"
    )
    assert line(test_old="passed", test_outputs="skipped", test_upstream="passed") == (
        "| loads | *served* (engine) | *served* (scheduler) | on Mondays |"
    )
    assert (
        line(test_outputs="passed", test_upstream="failed") == "| loads | *failed* | on Mondays |"
    )
    assert line(test_outputs="skipped") == "| loads | *not tried* | on Mondays |"
