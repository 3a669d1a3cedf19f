"""Norms that are none: left to the model with the reason, the rotation fused all the same.

Every module here gives eager's result when it is compiled.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.patterns.record import Norm
from tests.spellings import rsqrt, weightless
from tests.toys import Attention, compiled_like_eager, hidden_states

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def over_tokens(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + eps) * weight


def over_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + eps) * weight


def over_head_and_channels(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean((1, 3), keepdim=True) + eps) * weight


def eps_outside_the_root(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight


def eps_beside_the_root(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + eps) * weight


def of_half_the_head(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x[..., :8].pow(2).mean(-1, keepdim=True) + eps) * weight


def of_magnitudes(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + eps) * weight


def of_fourth_powers(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x * x * x).mean(-1, keepdim=True) + eps) * weight


def clamped_from_above(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_max(1e3 * eps) * weight


def clamped_from_both_sides(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(eps, 2.0) * weight


def a_clamped_inverse(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (1 / x.norm(dim=-1, keepdim=True)).clamp_min(0.3) * weight


def a_clamp_and_an_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).clamp_min(1.0).rsqrt() * weight


def of_the_length_itself(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * x.norm(dim=-1, keepdim=True).clamp_min(eps) * weight


def of_the_magnitude(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.normalize(x, p=1.0, dim=-1, eps=eps) * weight


def eps_from_a_tensor(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps * weight.mean()) * weight


def two_norms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(rsqrt(x, weight, eps), weight, eps)


def gated(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(x, weight, eps) * torch.sigmoid(x)


NO_NORM = {
    over_tokens: "differ in their statistic",
    over_heads: "differ in their statistic",
    over_head_and_channels: "a mean over other elements than a row's channels",
    eps_outside_the_root: "no rsqrt but reciprocal",
    eps_beside_the_root: "differ in their statistic",
    of_half_the_head: "a norm over 8 channels of 16",
    of_magnitudes: "a mean of something else than squares",
    of_fourth_powers: "a mean of something else than squares",
    clamped_from_above: "no rsqrt but reciprocal",
    clamped_from_both_sides: "no rsqrt but reciprocal",
    a_clamped_inverse: "a clamp of a reciprocal",
    a_clamp_and_an_eps: "a root that is not clamped, or a sum",
    of_the_length_itself: "no rsqrt but clamp_min",
    of_the_magnitude: "no rsqrt but reciprocal",
    eps_from_a_tensor: "an eps that is no scalar",
    two_norms: "more than one weight",
    gated: "2 data sources",
}


@pytest.mark.parametrize(
    ("norm", "reason"), NO_NORM.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_no_norm_before_the_rotation_is_left_to_the_model(norm: Any, reason: str) -> None:
    report = compiled_like_eager(Attention(norm=norm), hidden_states())
    (fused,) = report.fused
    assert fused.record.q.norm is None and fused.record.q.rotation is not None
    assert [r.stage for r in report.refused] == ["cut", "cut"], "one for q, one for k"
    assert all(reason in r.reason for r in report.refused)


@pytest.mark.parametrize(
    "norm", [n for n in NO_NORM if n not in (two_norms, gated)], ids=lambda f: f.__name__
)
def test_no_norm_after_the_rotation_stays_outside(norm: Any) -> None:
    report = compiled_like_eager(Attention(norm=norm, after=True), hidden_states())
    assert report.fused
    for fused in report.fused:
        assert fused.record.q.norm is None or fused.record.q.norm.over == "given"


def of_one_batch_row(x: Tensor) -> Tensor:
    return x[:1]


def of_one_head(x: Tensor) -> Tensor:
    return x[:, :1]


def of_one_token(x: Tensor) -> Tensor:
    return x[:, :, :1]


def of_the_token_before(x: Tensor) -> Tensor:
    return x.roll(1, 2)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "other", [of_one_batch_row, of_one_head, of_one_token, of_the_token_before]
)
def test_the_statistic_of_another_row_is_no_norm(other: Any, after: bool, caplog: Any) -> None:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(other(x).pow(2).mean(-1, keepdim=True) + eps) * weight

    with caplog.at_level(logging.ERROR, "fxfuse"):
        report = compiled_like_eager(Attention(norm=norm, after=after), hidden_states())
    assert caplog.records == []
    for fused in report.fused:
        given = Norm("given", "before", has_weight=not after)
        assert fused.record.q.norm in ((None, given) if after else (given,))


def test_a_weight_after_the_rotation_of_a_norm_before_it_stays_outside() -> None:
    """It meets the result's channels, the norm is of the source's."""
    toy = Attention(norm=weightless)
    toy.between = lambda q, k: (q * toy.q_weight, k * toy.k_weight)
    report = compiled_like_eager(toy, hidden_states())
    assert [f.record.q.norm for f in report.fused] == [Norm("head", "before", has_weight=False)]


@pytest.mark.parametrize("minus", [lambda w: 1 - w, lambda w: w.flip(0), lambda w: w * w])
def test_arithmetic_on_a_weight_stays_outside(minus: Any) -> None:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rsqrt(x, minus(weight), eps)

    report = compiled_like_eager(Attention(norm=norm), hidden_states())
    assert [f.record.q.norm for f in report.fused] == [Norm("head", "before", has_weight=True)]
