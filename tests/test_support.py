"""What the documents say is there agrees with what the code and the tests say."""

from __future__ import annotations

from tests.vllm import support


def test_the_support_table_is_what_the_tests_declare() -> None:
    """Each line is declared by a test or as not tried; `make test-vllm` writes the table."""
    assert support.written() == support.lines(support.declared())


def test_every_row_has_a_known_kind_and_status_and_one_name() -> None:
    """Nothing is served and refused at once, and served and refused is what tests show."""
    rows = support.declared()
    assert {row.kind for row in rows} == set(support.KINDS)
    assert {row.status for row in rows} == set(support.STATUSES)
    assert len({(row.kind, row.name) for row in rows}) == len(rows)
    assert all(row.status == "not tried" for row in support.NOT_TRIED)
