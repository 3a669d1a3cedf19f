"""Extending: what docs/adding.md asks for, done here: one entry in a table, and the site is fused.

Each entry is taken out of its table again, and without it the same toy keeps that part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from fxfuse.patterns.access import Refused
from fxfuse.patterns.norms import (
    NORM_KINDS,
    Statistic,
    eps_of,
    mean_of_squares,
    norm_kind,
    op_of,
)
from fxfuse.patterns.site import StoreWrite
from fxfuse.patterns.stores import LAYOUTS, cache_layout, rows_write
from fxfuse.patterns.value import Leaf
from fxfuse.slots import Call
from tests.toys import Attention, assert_like, attend, check, explain, hidden_states, stages

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


# --- a norm kind -------------------------------------------------------------------------------


def eps_outside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight


@pytest.fixture
def rms_eps_outside() -> Iterator[None]:
    @norm_kind("rms_eps_outside", factor=lambda mean, eps: 1 / (mean.sqrt() + eps))
    def read(leaf: Leaf) -> Statistic:
        """1 / (sqrt(mean(x * x)) + eps)"""
        if op_of(leaf) != "reciprocal":
            raise Refused("no reciprocal")
        terms = leaf.definition.operands[0].terms
        roots = [t for t in terms if t.factors and op_of(t.factors[0].leaf) == "sqrt"]
        if len(roots) != 1 or len(roots[0].factors) != 1 or set(roots[0].coefficients) != {1.0}:
            raise Refused("no root")
        (mean,) = roots[0].factors[0].leaf.definition.operands[0].leaves()
        eps = eps_of([t for t in terms if t is not roots[0]])
        return mean_of_squares("rms_eps_outside", mean, eps)

    yield
    del NORM_KINDS["rms_eps_outside"]


# A large eps, so that its place shows in the result.
def normed_toy(**options: Any) -> Attention:
    return Attention(norm=eps_outside, eps=(0.5, 0.25), **options)


def compiled_and_eager(toy: Attention, compiler: str) -> tuple[Tensor, Tensor]:
    x = hidden_states()
    with torch.no_grad():
        return torch.compile(toy, backend=fxfuse.Backend(compiler=compiler))(x), toy(x)


@pytest.mark.null
@pytest.mark.parametrize("after", [False, True], ids=["before the rotation", "after it"])
def test_one_entry_makes_a_norm_kind(rms_eps_outside: None, after: bool) -> None:
    (fused,) = explain(normed_toy(after=after), hidden_states()).fused
    assert fused.record.q.norm.kind == "rms_eps_outside" and fused.eps == (0.5, 0.25)
    assert_like(*compiled_and_eager(normed_toy(after=after), "eager"))


@pytest.mark.null
def test_without_the_entry_the_norm_is_refused() -> None:
    report = explain(normed_toy(), hidden_states())
    (fused,) = report.fused
    assert fused.record.q.norm is None
    assert len(report.refused) == 2, "one for q, one for k"
    for refusal in report.refused:
        assert refusal.stage == "cut"
        assert "a row factor that is no rsqrt but reciprocal" in refusal.reason


@pytest.mark.null
def test_a_new_kind_has_no_gradient(rms_eps_outside: None) -> None:
    report = fxfuse.explain(normed_toy(), hidden_states(), compiler="eager")
    (fused,) = report.fused
    assert fused.record.q.norm is None
    (reason,) = {r.reason for r in report.refused}
    assert "no gradient for the norm kind rms_eps_outside" in reason


@pytest.mark.cpu
def test_inductor_compiles_a_new_kind_to_loops(rms_eps_outside: None) -> None:
    # An entry made outside of fxfuse is in no key of Inductor's caches.
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert_like(*compiled_and_eager(normed_toy(), "inductor"))
    (fused,) = fxfuse.last_report().fused
    assert fused.provider == "loops"
    assert fused.record.q.norm.kind == "rms_eps_outside"


# --- a cache layout ----------------------------------------------------------------------------


def by_scatter(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.scatter_(2, slots[None, None, :, None].expand(k.shape), k)
    vs.scatter_(2, slots[None, None, :, None].expand(v.shape), v)
    return attend(q, ks, vs)


def by_a_slot_for_each_channel(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor
) -> Any:
    ks.scatter_(2, (slots[None, None, :, None] + torch.arange(16) % 2).expand(k.shape), k)
    return attend(q, ks, vs)


@pytest.fixture
def scatter() -> Iterator[None]:
    @cache_layout(aten.scatter_.src)
    def read(call: Call) -> StoreWrite:
        """cache.scatter_(2, slots[None, None, :, None].expand(value.shape), value)"""
        cache, dim, index, value = call.args
        if dim != 2 or index.stride != (0, 0, 1, 0):
            raise Refused("a scatter_ that writes no whole rows")
        slots = index
        while len(slots.shape) > 1 and slots.call and slots.call.inputs():
            slots = slots.call.inputs()[0]
        if slots.storage != index.storage or slots.offset != index.offset:
            raise Refused("slots that no node of the graph holds")
        return rows_write(call, cache, dim, slots, value, "invalid")

    yield
    del LAYOUTS[aten.scatter_.src]


@pytest.mark.null
def test_one_entry_makes_a_cache_layout(scatter: None) -> None:
    report = check(by_scatter)
    assert stages(report) == ["store(k,v)"] and report.refused == []
    assert report.fused[0].record.store.negative == "invalid"
    assert not report.fused[0].record.k.keep, "attention reads the cache"


@pytest.mark.null
def test_without_the_entry_the_store_stays_the_models() -> None:
    report = check(by_scatter)
    assert stages(report) == [""], "the rotation is fused, the write is not"
    (refusal,) = report.refused
    assert refusal.stage == "store"
    assert refusal.reason == "aten.scatter_.src is no cache write that is known"


@pytest.mark.null
def test_the_entry_says_why_another_write_of_its_op_is_none(scatter: None) -> None:
    report = check(by_a_slot_for_each_channel)
    assert stages(report) == [""]
    assert [(r.stage, r.reason) for r in report.refused] == [
        ("store", "a scatter_ that writes no whole rows")
    ]
