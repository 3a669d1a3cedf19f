"""Norms of q and k without a rotation: found, joined, stored, or left alone with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxfuse
from fxfuse.patterns.record import Norm, Pass, Record
from tests.norm_toys import Gated, NormedAttention, compiled
from tests.spellings import NORMS, gemma, rsqrt, weightless
from tests.toys import (
    Attention,
    Layer,
    Sizes,
    assert_like,
    attend,
    by_index_copy,
    caches,
    hidden_states,
    stages,
)

pytestmark = pytest.mark.null
T = 5


def record(report: fxfuse.Report) -> Record:
    """The record of the one site that takes q and k."""
    assert [f.kind for f in report.fused] == ["norm"] and report.refused == []
    found = report.fused[0].record
    assert isinstance(found, Record) and found.k is not None
    return found


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.__name__)
def test_each_spelling_of_the_norm(norm: Any) -> None:
    report = compiled(NormedAttention(norm, eps=(1e-5, 1e-6)), hidden_states())
    for stream in (record(report).q, record(report).k):
        assert stream is not None and stream.norm == Norm("head", "before", has_weight=True)
        assert (stream.rotation, stream.passes) == (None, (Pass(0, 0, 16),))
    assert (report.fused[0].eps, report.fused[0].stages) == ((1e-5, 1e-6), ("rms_norm",))


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [(gemma, Norm("head", "before", True, 1.0)), (weightless, Norm("head", "before", False))],
)
def test_weights_that_add_one_and_none_at_all(norm: Any, wanted: Norm) -> None:
    assert record(compiled(NormedAttention(norm), hidden_states())).q.norm == wanted


@pytest.mark.parametrize(
    "toy",
    [
        Gated(),
        NormedAttention(packing="slices"),
        NormedAttention(packing="one view"),
        NormedAttention(packing="by head", sizes=Sizes(kv_heads=4)),
        NormedAttention(tokens_first=True),
        NormedAttention(sizes=Sizes(head_dim=24, heads=3, kv_heads=1)),
        NormedAttention(tokens_first=True, sizes=Sizes(kv_heads=1)),
    ],
    ids=["gated", "slices", "one view", "by head", "tokens first", "one", "one, tokens first"],
)
def test_each_packing_of_the_projection(toy: Attention) -> None:
    assert record(compiled(toy, hidden_states())).q.norm is not None


def test_a_factor_of_q_is_part_of_the_record() -> None:
    toy = NormedAttention(between=lambda q, k: (q * 0.25, k))
    found = record(compiled(toy, hidden_states()))
    assert found.k is not None and (found.q.scale, found.k.scale) == (0.25, 1.0)


class Unrotated(Layer):
    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


def finished(finish: Callable[..., Any], *memory: Tensor, **settings: Any) -> fxfuse.Report:
    """Outputs and memory are eager's; the report."""
    torch._dynamo.reset()
    layer, copies = Unrotated(finish), [m.clone() for m in memory]
    with torch.no_grad():
        want = layer(hidden_states(T), *copies)
        backend = fxfuse.Backend(compiler="eager", gate="always", **settings)
        got = torch.compile(layer, backend=backend)(hidden_states(T), *memory)
    assert_like(got, want)
    assert_like(list(memory), copies)
    report = fxfuse.last_report()
    assert report is not None
    return report


def test_the_caches_are_stored_to_by_the_same_op() -> None:
    report = finished(by_index_copy, *caches())
    assert record(report).store is not None and stages(report) == ["store(k,v)"]


def test_a_cache_that_grows_by_cat() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        return attend(q, torch.cat([ks, k], 2), torch.cat([vs, v], 2))

    report = finished(finish, *caches())
    assert [f.kind for f in report.fused] == ["norm"]
    assert [r.stage for r in report.refused] == ["store"]


def test_attention_by_two_matrix_products() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return torch.matmul(torch.matmul(q, k.transpose(2, 3)).softmax(-1), v)

    assert record(finished(finish)).q.norm is not None


def test_a_normed_k_that_is_returned_too() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend(q, k, v), k, q.sum()

    assert record(finished(finish)).q.norm is not None


def test_cross_attention_has_two_sites() -> None:
    """q and k of as many tokens are one op; of unlike numbers they are no one op's."""

    class Cross(NormedAttention):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
            (q, _, _), (_, k, v) = self.split(x), self.split(other)
            return attend(*self.prelude(q, k, x, x), v)

    report = compiled(Cross(), hidden_states(4), hidden_states(7))
    assert [f.kind for f in report.fused] == ["norm", "key"]
    assert all(isinstance(f.record, Record) and f.record.k is None for f in report.fused)


def test_two_attentions_do_not_mix() -> None:
    class Two(NormedAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            first, second = self.split(x), self.split(x * 2)
            (q, k), (r, m) = (self.prelude(*both[:2], x, x) for both in (first, second))
            return attend(q, k, first[2]) + attend(r, m, second[2])

    report = compiled(Two(norm=gemma), hidden_states())
    assert [f.kind for f in report.fused] == ["norm", "norm"]
    assert all(isinstance(f.record, Record) and f.record.k for f in report.fused)


def test_norms_under_a_rotation_are_its_sites() -> None:
    before = fxfuse.counts()
    report = compiled(Attention(norm=rsqrt), hidden_states())
    after = fxfuse.counts()
    assert [f.kind for f in report.fused] == ["attention"]
    assert {k: after[k] - before.get(k, 0) for k in ("attention", "norm")} == {
        "attention": 1,
        "norm": 0,
    }


def test_every_number_of_tokens() -> None:
    x = hidden_states(6)
    torch._dynamo.mark_dynamic(x, 1)
    assert record(compiled(NormedAttention(), x)).q.norm is not None


# --- what is not the target --------------------------------------------------------------------


def of_k(q: Tensor, k: Tensor) -> Tensor:
    rows = torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + 1e-6)
    return q * rows.repeat_interleave(2, 1)


def eps_outside(q: Tensor, k: Tensor) -> Tensor:
    return q * (torch.rsqrt(q.pow(2).mean(-1, keepdim=True)) + 1e-6)


def over_tokens(q: Tensor, k: Tensor) -> Tensor:
    return q * torch.rsqrt(q.pow(2).mean(-2, keepdim=True) + 1e-6)


def over_heads(q: Tensor, k: Tensor) -> Tensor:
    return q * torch.rsqrt(q.pow(2).mean(1, keepdim=True) + 1e-6)


def of_half_a_head(q: Tensor, k: Tensor) -> Tensor:
    return q * torch.rsqrt(q[..., :8].pow(2).mean(-1, keepdim=True) + 1e-6)


def of_the_next_token(q: Tensor, k: Tensor) -> Tensor:
    rows = torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6)
    return q * rows.roll(1, 2)


def of_fourths(q: Tensor, k: Tensor) -> Tensor:
    return q * torch.rsqrt(q.pow(4).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    "wrong",
    [of_k, eps_outside, over_tokens, over_heads, of_half_a_head, of_the_next_token, of_fourths],
    ids=lambda f: f.__name__,
)
def test_what_looks_like_a_norm_of_q_and_is_not(wrong: Any) -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(wrong(q, k), k, v)

    class Plain(Unrotated):
        def prelude(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            return q, self.norm(k, self.k_weight, 1e-6) if self.norm else k

    with torch.no_grad():
        report = compiled(Plain(finish), hidden_states(T), strict=True)
    assert all(isinstance(f.record, Record) for f in report.fused)
    assert not any(f.record.k for f in report.fused if isinstance(f.record, Record))


def test_a_norm_of_q_alone_stays() -> None:
    class Alone(NormedAttention):
        def prelude(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            return rsqrt(q, self.q_weight, 1e-6), k

    report = compiled(Alone(), hidden_states(), strict=True)
    assert (report.fused, report.refused, report.left) == ([], [], [])


def test_a_norm_over_all_heads_is_one_of_the_hidden_width() -> None:
    report = compiled(NormedAttention(wide=True), hidden_states())
    assert [f.kind for f in report.fused] == ["add_rms_norm", "add_rms_norm"]


def test_a_write_to_q_between_norm_and_attention() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q[:, :, 0] = 0
        return attend(q, k, v)

    assert finished(finish).fused == []


def test_v_is_no_k() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, v, k, enable_gqa=True)

    report = finished(finish)
    assert report.fused == [] and report.refused == []


# --- gradients ---------------------------------------------------------------------------------


def test_gradients_are_eagers() -> None:
    torch._dynamo.reset()
    toy, x = NormedAttention(), hidden_states()
    toy(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in toy.named_parameters() if p.grad is not None}
    toy.zero_grad()
    backend = fxfuse.Backend(compiler="aot_eager", gate="always")
    torch.compile(toy, backend=backend)(x).square().sum().backward()
    report = fxfuse.last_report()
    assert report is not None and [f.kind for f in report.fused] == ["norm"]
    for name, parameter in toy.named_parameters():
        assert_like(parameter.grad, want[name], 1e-4)
