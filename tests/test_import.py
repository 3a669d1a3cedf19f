"""What `import fxfuse` does: it defines the ops, and leaves all else to first use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fxfuse

pytestmark = pytest.mark.null
ROOT = Path(__file__).resolve().parents[1]

OPS_OF_A_FRESH_PROCESS = """
import torch, fxfuse
from torch._subclasses.fake_tensor import FakeTensorMode

record = '{"addends":2,"channels":4,"dtype":"float32","keep_sum":true,"norm":{"over":"head",' \\
    '"when":"before","has_weight":false,"weight_offset":0.0,"kind":"rms","has_bias":false}}'
with FakeTensorMode():
    x = torch.ones(2, 4)
    print([tuple(y.shape) for y in torch.ops.fxfuse.add_rms_norm(x, x, None, None, 0.0, record)])
x = torch.ones(2, 4, requires_grad=True)
total, y = torch.ops.fxfuse.add_rms_norm(x, x, None, None, 0.0, record)
total.sum().backward()
print(y.tolist(), x.grad.tolist())
print(fxfuse.ops.add_rms_norm(x, x)[0].tolist())
"""


def in_a_fresh_process(code: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def imported_beyond_torch(statement: str) -> set[str]:
    code = f"""
import sys, torch
before = set(sys.modules)
{statement}
print(*sorted(set(sys.modules) - before))
"""
    return set(in_a_fresh_process(code).split())


def test_import_defines_the_ops_and_no_more() -> None:
    assert imported_beyond_torch("import fxfuse") == {"fxfuse", "fxfuse.schemas"}


def test_the_backend_is_there_before_what_compiles() -> None:
    light = {"fxfuse", *(f"fxfuse.{x}" for x in ("schemas", "entry", "garbage", "settings"))}
    assert imported_beyond_torch("import fxfuse; fxfuse.backend") == light


def test_every_public_name_is_there() -> None:
    code = "from fxfuse import *; print(*sorted(n for n in dir() if not n.startswith('__')))"
    assert in_a_fresh_process(code).split() == sorted(fxfuse.__all__)
    assert set(fxfuse.__all__) <= set(dir(fxfuse))


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fxfuse' has no attribute 'nothing'"):
        fxfuse.nothing  # noqa: B018


def test_a_provider_entered_before_the_first_compile_is_asked_first() -> None:
    code = """
import fxfuse
fxfuse.register_provider("mine", print, ops=["add_rms_norm"])
from fxfuse.lowering.providers import PROVIDERS
print(*(p.name for p in PROVIDERS if "add_rms_norm" in p.ops))
"""
    first, *others = in_a_fresh_process(code).split()
    assert first == "mine" and {"triton", "loops"} <= set(others)


def test_ops_run_where_nothing_else_was_imported() -> None:
    shapes, results, by_hand = in_a_fresh_process(OPS_OF_A_FRESH_PROCESS).splitlines()
    assert shapes == "[(2, 4), (2, 4)]"
    assert results == f"{[[1.0] * 4] * 2} {[[2.0] * 4] * 2}"
    assert by_hand == f"{[[2.0] * 4] * 2}"
