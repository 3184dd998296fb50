"""docs/tensorrt_llm.md: every file, symbol and test in its tables of traps is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "tensorrt_llm.md").read_text(encoding="utf-8")
SECTION = DOCUMENT.partition("## Traps")[2].partition("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in SECTION.splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| trap |", "| probe |"))
]
ENGINE = "plugins/engines/tensorrt_llm/"
FILE = re.compile(r"^[\w/]+\.(py|yaml)$|^Dockerfile$")


@cache
def defined(path: Path) -> frozenset[str]:
    """Names of a module, and `Class.name` of its classes."""
    names: set[str] = set()
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        names.update(_names(statement))
        if isinstance(statement, ast.ClassDef):
            inner = (name for part in statement.body for name in _names(part))
            names.update(f"{statement.name}.{name}" for name in inner)
    return frozenset(names)


def _names(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Assign():
            return [target.id for target in statement.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.ImportFrom():
            return [alias.name for alias in statement.names]
    return []


def missing_place(span: str) -> str:
    """What is not there of `file.py Symbol`; empty if all is, or if it is no place at all."""
    name, _, symbol = span.partition(" ")
    if not FILE.match(name):
        return ""
    path = ROOT / (name if "/" in name or name == "Dockerfile" else ENGINE + name)
    if not path.is_file():
        return name
    return f"{name} has no {symbol}" if symbol and symbol not in defined(path) else ""


def missing_test(span: str) -> str:
    name, _, test = span.partition("::")
    if name == "conformance":
        paths = list((ROOT / "plugins" / "conformance").glob("engine_*.py"))
    elif "/" in name or (ROOT / "tests" / name).is_file():
        paths = [ROOT / "tests" / name]
    else:
        paths = [ROOT / "tests" / ENGINE / name]
    if not all(path.is_file() for path in paths):
        return name
    found = frozenset[str]().union(*(_with_imported(path) for path in paths))
    return f"{name} has no {test}" if test and test not in found else ""


def _with_imported(path: Path) -> frozenset[str]:
    """Tests of other modules too, where they are imported to be run."""
    starred = re.findall(r"^from (tests\.[\w.]+) import \*", path.read_text(encoding="utf-8"), re.MULTILINE)
    others = (defined(ROOT / f"{module.replace('.', '/')}.py") for module in starred)
    return defined(path).union(*others)


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:50] for row in ROWS])
def test_what_a_row_names_is_there(row):
    assert len(row) == 3 and all(row), row
    _, where, tests = row
    assert [problem for span in re.findall(r"`([^`]+)`", where) if (problem := missing_place(span))] == []
    named = [span for span in re.findall(r"`([^`]+)`", tests) if "test" in span or "::" in span]
    assert named or "no test" in tests, row
    assert [problem for span in named if (problem := missing_test(span))] == []


def test_there_are_rows():
    assert len(ROWS) > 80
    assert missing_place("results.py Nothing") and missing_place("nothing.py") == "nothing.py"
    assert missing_test("test_rules.py::test_nothing") and missing_test("conformance::test_nothing")
