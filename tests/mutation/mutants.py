"""Finds small changes that a test should notice, as replacements of bytes in a source file.

It changes comparisons, conditions, arithmetic, numbers, returned values and statements without a
value. It leaves code alone that does not determine behaviour: annotations, decorators, bases,
assertions, error messages, log lines, `__repr__`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "*"), ast.Mod: ("%", "*"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip
BOUNDS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
"""Comparisons whose bound is moved; the others are negated."""
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
LOGS = {"log", "_log", "logger"}
UNSEEN = {"__repr__", "__str__"}


@dataclass(frozen=True, order=True)
class Mutant:
    """One change of one file."""

    file: str
    start: int
    end: int
    text: str
    line: int
    before: str
    after: str

    def apply(self, source: bytes) -> bytes:
        """Return the file's source with the change applied."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants_of(root: Path, file: str) -> list[Mutant]:
    """Return every mutant of a file, in the order of the source."""
    source = (root / file).read_bytes()
    finder = Finder(source)
    finder.visit(ast.parse(source))
    return sorted(_named(file, source, *edit) for edit in set(finder.edits))


def _named(file: str, source: bytes, start: int, end: int, text: str) -> Mutant:
    """Return the mutant of an edit, with its lines before and after, without indentation."""
    first = source.rfind(b"\n", 0, start) + 1
    last = source.find(b"\n", end)
    last = len(source) if last < 0 else last
    before = source[first:last].decode()
    after = source[first:start].decode() + text + source[end:last].decode()
    line = source.count(b"\n", 0, start) + 1
    return Mutant(file, start, end, text, line, " ".join(before.split()), " ".join(after.split()))


class Finder(ast.NodeVisitor):
    """Collects the edits of one source as (start, end, replacement)."""

    def __init__(self, source: bytes) -> None:
        self._source = source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self.edits: list[tuple[int, int, str]] = []

    def _span(self, node: Any) -> tuple[int, int]:
        place = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
        return self._lines[place[0] - 1] + place[1], self._lines[place[2] - 1] + place[3]

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self._source[start:end].decode()

    def _replace(self, node: ast.AST, text: str) -> None:
        self.edits.append((*self._span(node), text))

    def _swap(self, left: ast.AST, right: ast.AST, words: tuple[str, str]) -> None:
        """Replace the operator between two operands."""
        start, end = self._span(left)[1], self._span(right)[0]
        between = self._source[start:end].decode()
        pattern = r"\s+".join(map(re.escape, words[0].split()))
        if found := re.search(pattern, between):
            at = start + len(between[: found.start()].encode())
            self.edits.append((at, at + len(found[0].encode()), words[1]))

    def visit_Compare(self, node: ast.Compare) -> None:
        """Move a bound by one, or negate a comparison."""
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            self._swap(left, right, COMPARISONS[type(operator)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Exchange `and` and `or`."""
        words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._swap(left, right, words)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Drop a `not` or a minus."""
        if isinstance(node.op, ast.Not | ast.USub):
            self._replace(node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Exchange arithmetic operators, except the `+` of strings."""
        texts = any(
            isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), str | bytes)
            for part in (node.left, node.right)
        )
        if not texts and type(node.op) in ARITHMETIC:
            self._swap(node.left, node.right, ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """Exchange the operators of augmented assignments."""
        if type(node.op) in ARITHMETIC:
            words = ARITHMETIC[type(node.op)]
            self._swap(node.target, node.value, (f"{words[0]}=", f"{words[1]}="))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Negate a truth value, or add one to a number."""
        if isinstance(node.value, bool):
            self._replace(node, str(not node.value))
        elif isinstance(node.value, int | float):
            self._replace(node, f"({self._text(node)} + 1)")

    def visit_Return(self, node: ast.Return) -> None:
        """Return None instead of a value."""
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self._replace(node.value, "None")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        """Drop a call whose result is not used, unless it logs."""
        call = node.value.value if isinstance(node.value, ast.Await) else node.value
        if isinstance(call, ast.Constant) or (isinstance(call, ast.Call) and _is_log(call)):
            return
        self._replace(node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Drop an assignment to an attribute or an item."""
        if any(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self._replace(node, "pass")
        if not any(isinstance(t, ast.Name) and t.id.startswith("__") for t in node.targets):
            self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        """Drop the deletion."""
        self._replace(node, "pass")

    def visit_Raise(self, node: ast.Raise) -> None:
        """Drop the raise."""
        self._replace(node, "pass")

    def visit_Break(self, node: ast.Break) -> None:
        """Turn `break` into `continue`."""
        self._replace(node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        """Turn `continue` into `break`."""
        self._replace(node, "break")

    def _negate(self, test: ast.expr) -> None:
        is_not = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        one = test.ops[0] if isinstance(test, ast.Compare) and len(test.ops) == 1 else ast.Lt()
        if not is_not and isinstance(one, BOUNDS):  # `not` and other comparisons are negated above
            self._replace(test, f"(not ({self._text(test)}))")

    def visit_If(self, node: ast.If) -> None:
        """Negate the condition."""
        if "TYPE_CHECKING" not in self._text(node.test):
            self._negate(node.test)
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """Negate the condition of a conditional expression."""
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Negate the condition of a comprehension."""
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Exchange a function for its opposite."""
        if isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            self._replace(node.func, FUNCTIONS[node.func.id])
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Drop an annotated assignment to an attribute or an item; leave annotations alone."""
        if node.value is not None and "TypeAlias" not in self._text(node.annotation):
            if isinstance(node.target, ast.Attribute | ast.Subscript):
                self._replace(node, "pass")
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Visit the defaults and the body."""
        if node.name not in UNSEEN:
            defaults = [each for each in node.args.kw_defaults if each is not None]
            self._visit_all(iter([*node.args.defaults, *defaults, *node.body]))

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        """Visit the defaults and the body."""
        self.visit_FunctionDef(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Visit the body."""
        self._visit_all(iter(node.body))

    def _visit_all(self, nodes: Iterator[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Leave assertions alone: they guard against our own mistakes."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave f-strings alone: a message is not behaviour."""


def _is_log(call: ast.Call) -> bool:
    receiver = call.func.value if isinstance(call.func, ast.Attribute) else call.func
    name = receiver.attr if isinstance(receiver, ast.Attribute) else getattr(receiver, "id", "")
    return name in LOGS
