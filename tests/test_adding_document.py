"""docs/adding.md: its Python is one program that runs, and what it names is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._inductor.utils import fresh_cache

from fxfuse.lowering import gate, providers
from fxfuse.patterns.stores import LAYOUTS
from fxfuse.patterns.transfer import TRANSFERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "adding.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.cpu
def test_the_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one program; what it enters is taken out of the tables again."""
    monkeypatch.setattr(gate, "TABLE", gate.TABLE)
    # Dynamo up to torch 2.12 imports the module whose functions it traces.
    module = ModuleType("adding")
    monkeypatch.setitem(sys.modules, "adding", module)
    known, layouts, asked = set(TRANSFERS), dict(LAYOUTS), list(providers.PROVIDERS)
    assert len(BLOCKS) == 5
    try:
        with fresh_cache():
            exec(compile("\n".join(BLOCKS), "adding.md", "exec"), vars(module))
        assert set(TRANSFERS) - known == {torch.ops.mylib.negated.default}
    finally:
        for op in set(TRANSFERS) - known:
            del TRANSFERS[op]
        torch._dynamo.reset()
    assert layouts == LAYOUTS and asked == providers.PROVIDERS


@pytest.mark.null
@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+\w+\.py)`", TEXT))))
def test_the_files_are_there(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.null
@pytest.mark.parametrize("row", re.findall(r"^\| .* \|$", TEXT, re.MULTILINE)[1:])
def test_each_file_holds_its_entry(row: str) -> None:
    """What a row names is a word of some file that the row names."""
    _, _, entry, test, _ = (cell.strip() for cell in row.split("|"))
    for cell in (entry, test):
        code = re.findall(r"`([^`]+)`", cell)
        files = [ROOT / x for x in code if x.endswith(".py")]
        files += [ROOT / "fxfuse" / "__init__.py"]
        texts = "\n".join(path.read_text() for path in files)
        for name in (x for x in code if not x.endswith((".py", "/"))):
            assert re.search(rf"\b{name.removeprefix('fxfuse.')}\b", texts), name
