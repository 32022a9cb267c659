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


def test_the_support_table_is_what_the_tests_declare() -> None:
    """Each line of the support table is declared by a test or as not tried.

    `make test-vllm` writes the table, with the soak tests.
    """
    assert support.written() == support.lines(support.declared())


def test_every_row_has_a_known_kind_and_status_and_one_name() -> None:
    """Each row has a unique name, a known kind and a known status; an untried row has no other."""
    rows = support.declared()
    assert {row.kind for row in rows} == set(support.KINDS)
    assert {row.status for row in rows} == set(support.STATUSES)
    assert len({(row.kind, row.name) for row in rows}) == len(rows)
    assert all(row.status == "not tried" for row in support.NOT_TRIED)
