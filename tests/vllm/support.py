"""The table of `docs/vllm.md`: what FlexKV serves under vLLM, as the tests declare it.

A test that proves a row has the mark `support(kind, name, status, note)`, where the kind is one
of `KINDS` and the status "served" or "refused". `NOT_TRIED` has the rows that no test proves.

    make test-vllm ARGS='--write-support -m ""'   writes the table: rows whose tests have passed
    pytest tests/test_support.py                  compares it with what the tests declare
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/vllm.md"
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
KINDS = {"version": "vLLM", "model": "models", "feature": "features"}
STATUSES = ("served", "refused", "not tried")


class Row(NamedTuple):
    """One line of the table."""

    kind: str
    name: str
    status: str
    note: str = ""


NOT_TRIED = (
    Row("version", "0.17.2 to 0.31", "not tried",
        "no run; what FlexKV uses of 0.18.1 and 0.25.1 is compared with their sources"),
    Row("version", "0.33.0", "not tried",
        "no run; it differs from 0.32.0 by three hooks, which FlexKV has"),
    Row("model", "with MLA (DeepSeek V2, V3)", "not tried",
        "no run: vLLM caches no prefixes of MLA on a CPU without AMX; its blocks are tested"),
    Row("model", "mixture of experts (Mixtral, Qwen3-MoE)", "not tried",
        "their KV cache is that of a plain model"),
    Row("model", "with images or sounds (Qwen2-VL)", "not tried",
        "no run; keys of their prompts are tested over vLLM's own hashes"),
    Row("model", "with layers that share a KV cache (Gemma 3n), or have none (Nemotron-NAS)",
        "not tried", "no run; which layers are transferred is tested over vLLM's own classes"),
    Row("feature", "MTP of models with MLA (DeepSeek V3), drafts of models with states",
        "not tried", "vLLM caches no prefixes of the former on a CPU without AMX, and runs the"
        " latter only with Triton"),
    Row("feature", "`--kv-cache-dtype-skip-layers`", "not tried",
        "no run; with its own connector, and its layouts are tested"),
    Row("feature", "GPUs", "not tried",
        "no run under vLLM; FlexKV itself has run on one: see the README"),
    Row("feature", "quantised KV cache (`fp8`, `fp8_e4m3`, `fp8_e5m2`)", "not tried", ""),
    Row("feature", "LoRA adapters", "not tried", "no run; keys of their prompts are tested"),
    Row("feature", "streaming input (resumable requests)", "not tried", ""),
    Row("feature", "disaggregated prefill beside another connector", "not tried", ""),
)  # fmt: skip


def declared() -> list[Row]:
    """Return the rows that tests declare, in their order, and those that nobody has tried."""
    rows: dict[Row, None] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _is_mark(node.func):
                rows[Row(*(ast.literal_eval(argument) for argument in node.args))] = None
    return [*rows, *NOT_TRIED]


def _is_mark(function: ast.expr) -> bool:
    """Return whether a call is `support(…)` or `pytest.mark.support(…)`."""
    name = getattr(function, "attr", getattr(function, "id", ""))
    return bool(name == "support")


def written() -> list[str]:
    """Return the table's lines in the document."""
    text = DOCUMENT.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()


def lines(rows: Iterable[Row]) -> list[str]:
    """Return the lines of a table of rows, by kind; within each kind served rows come first."""
    order = {row: number for number, row in enumerate(rows)}
    table = ["| | | |", "|---|---|---|"]
    for kind, title in KINDS.items():
        table.append(f"| **{title}** | | |")
        of_kind = [row for row in order if row.kind == kind]
        of_kind.sort(key=lambda row: (STATUSES.index(row.status), order[row]))
        table += [f"| {row.name} | *{row.status}* | {row.note} |" for row in of_kind]
    return table


def write(rows: Iterable[Row]) -> None:
    """Replace the table in the document by one of these rows."""
    text = DOCUMENT.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOCUMENT.write_text("\n".join([before, *lines(rows), after]))
