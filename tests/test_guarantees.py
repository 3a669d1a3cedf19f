"""docs/guarantees.md names tests that exist, and every row of it names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.null

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> dict[str, list[tuple[str, str]]]:
    """What could go wrong -> (file, test) of each test that is named for it."""
    lines = (ROOT / "docs/guarantees.md").read_text().splitlines()
    cells = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    return {cell[0].strip(): NAMED.findall(cell[1]) for cell in cells if "could go" not in cell[0]}


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}


@pytest.mark.parametrize("fault", rows())
def test_each_fault_has_a_test(fault: str) -> None:
    named = rows()[fault]
    assert named
    missing = [f"{path}::{test}" for path, test in named if test not in functions(path)]
    assert not missing
    assert all(test.startswith("test_") for _, test in named)


def test_a_test_that_is_gone_is_missed() -> None:
    assert len(rows()) > 50
    assert "test_each_fault_has_a_test" in functions("tests/test_guarantees.py")
    assert "test_no_such" not in functions("tests/test_guarantees.py")
