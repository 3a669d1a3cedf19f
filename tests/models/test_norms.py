"""Norms of the hidden width in real models: left by the gate, or fused with the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxfuse
from tests.models.tiny import (
    PROMPT,
    assert_close,
    assert_same_cache,
    model_of,
    static_cache,
    token_ids,
)

KINDS = ("attention", "norm", "add_rms_norm", "store")


def counted(before: dict[str, int]) -> tuple[int, ...]:
    after = fxfuse.counts()
    return tuple(after.get(k, 0) - before.get(k, 0) for k in KINDS)


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("aot_eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=[pytest.mark.cpu, pytest.mark.long]),
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "llama"])
@torch.no_grad()
def test_every_norm_is_fused_where_the_gate_is_open(name: str, compiler: Any) -> None:
    torch._dynamo.reset()
    model, ids, before = model_of(name), token_ids(PROMPT), fxfuse.counts()
    want_cache, got_cache = static_cache(model), static_cache(model)
    want = model(ids, past_key_values=want_cache).logits
    backend = fxfuse.Backend(compiler=compiler, gate="always", strict=True)
    got = torch.compile(model, backend=backend)(ids, past_key_values=got_cache).logits
    assert_close(got, want, name)
    assert_same_cache(got_cache, want_cache, name)
    # Two layers of two norms, and the last one; the second attention takes in that in front of it.
    assert counted(before) == (2, 0, 4, 2)
    report = fxfuse.last_report()
    assert report is not None and report.left == []
    adds = [f.stages.count("add") for f in report.fused if f.kind == "add_rms_norm"]
    assert adds == [0, 1, 1, 1]
    fronts = [f.stages.count("add") for f in report.fused if f.kind == "attention"]
    assert fronts == [0, 1]


@pytest.mark.null
@pytest.mark.parametrize("name", ["qwen3", "llama"])
@torch.no_grad()
def test_the_gate_leaves_them_as_it_stands(name: str) -> None:
    torch._dynamo.reset()
    model, before = model_of(name), fxfuse.counts()
    backend = fxfuse.Backend(compiler="aot_eager", strict=True)
    torch.compile(model, backend=backend)(token_ids(PROMPT), use_cache=False)
    assert counted(before) == (2, 0, 0, 0)
    assert "left 5 × add + rms_norm: Inductor's own kernel is as fast (target cpu)" in str(
        fxfuse.last_report()
    )
