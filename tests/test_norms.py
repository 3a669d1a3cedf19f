"""L2 norms and layer norms: their spellings, what is added to them, and their near misses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxfuse
from fxfuse.patterns.record import Norm, Pass
from tests import spellings
from tests.spellings import Rope, layer, rsqrt
from tests.test_decoding import streams
from tests.toys import LLAMA, Attention, Sizes, assert_like, compiled_like_eager, hidden_states

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


both_ways = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
# Large, so that it decides for some rows and not for others.
EPS = (4.0, 2.0)


@both_ways
@pytest.mark.parametrize("norm", spellings.L2_NORMS, ids=lambda n: n.__name__)
def test_each_spelling_of_an_l2_norm(norm: Any, after: bool) -> None:
    """Of 16 channels: a row's length is four times the root of its mean square."""
    report = compiled_like_eager(Attention(norm=norm, after=after, eps=EPS), hidden_states())
    for stream in streams(report):
        assert stream.norm == Norm("head", "after" if after else "before", True, kind="l2")
        assert stream.scale == (1.0 if norm is spellings.zaya else 0.25)
    assert report.fused[0].eps == (1.0, 0.5)
    assert "l2_norm" in report.fused[0].stages


@both_ways
def test_a_sum_of_squares_is_an_rms_norm_of_another_size(after: bool) -> None:
    toy = Attention(norm=spellings.length, after=after, eps=EPS)
    report = compiled_like_eager(toy, hidden_states())
    for stream in streams(report):
        assert stream.norm == Norm("head", "after" if after else "before", has_weight=True)
        assert stream.scale == 0.25
    assert report.fused[0].eps == (0.25, 0.125)


@both_ways
@pytest.mark.parametrize("norm", spellings.LAYER_NORMS, ids=lambda n: n.__name__)
def test_each_spelling_of_a_layer_norm(norm: Any, after: bool) -> None:
    report = compiled_like_eager(Attention(norm=norm, after=after, eps=EPS), hidden_states())
    for stream in streams(report):
        assert stream.norm == Norm("head", "after" if after else "before", True, kind="layer")
    assert report.fused[0].eps == EPS
    assert "layer_norm" in report.fused[0].stages


@pytest.mark.parametrize("rope", [LLAMA, Rope(spellings.deepseek)], ids=str)
@pytest.mark.parametrize(
    ("norm", "after"),
    [
        (spellings.layer_and_bias, False),
        (spellings.layer_and_bias, True),
        (spellings.chameleon, False),
    ],
    ids=["layer_and_bias, before", "layer_and_bias, after", "chameleon, before"],
)
def test_each_spelling_of_a_bias(norm: Any, rope: Rope, after: bool) -> None:
    toy = Attention(rope, norm, after=after, partial="inside", sizes=Sizes(rotary=10))
    for stream in streams(compiled_like_eager(toy, hidden_states())):
        when = "after" if after else "before"
        assert stream.norm == Norm("head", when, True, kind="layer", has_bias=True)
        assert stream.passes == (Pass(10, 10, 6),)


@both_ways
@pytest.mark.parametrize("has_bias", [False, True])
def test_weight_and_bias_by_head_on_axes_of_their_own(has_bias: bool, after: bool) -> None:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        by_head = torch.outer(weight[: x.shape[2]], weight)
        y = spellings.cohere_norm(x, by_head, eps)
        return y + by_head / 2 if has_bias else y

    toy = Attention(norm=norm, after=after, tokens_first=True)
    for stream in streams(compiled_like_eager(toy, hidden_states())):
        when = "after" if after else "before"
        assert stream.norm == Norm("head", when, True, kind="layer", has_bias=has_bias)


def test_a_weight_for_each_head_alone_is_a_factor_by_row() -> None:
    """zaya's temperature of k."""

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.normalize(x, dim=-1, eps=eps) * weight[: x.shape[2], None]

    toy = Attention(norm=norm, tokens_first=True)
    for stream in streams(compiled_like_eager(toy, hidden_states())):
        assert stream.has_scale and stream.norm is not None and not stream.norm.has_weight


# --- compiled, and differentiated --------------------------------------------------------------

CHAINS = {
    "layer_norm, bias": Attention(norm=spellings.layer_and_bias, eps=EPS),
    "bias, after": Attention(norm=spellings.layer_and_bias, after=True, eps=EPS),
    "by hand": Attention(norm=spellings.cohere_norm, eps=EPS),
    "l2": Attention(norm=spellings.zaya, eps=EPS),
    "l2, after": Attention(norm=spellings.normalized, after=True, eps=EPS),
    "whole width": Attention(norm=spellings.functional, wide=True, eps=EPS),
}
chains = pytest.mark.parametrize("toy", CHAINS.values(), ids=CHAINS)


@chains
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.cpu)])
def test_gradients_are_eagers(toy: Attention, compiler: str) -> None:
    def gradients(run: Any) -> list[Tensor]:
        x = hidden_states().requires_grad_()
        weights = [toy.project.weight, toy.q_weight, toy.k_weight]
        return list(torch.autograd.grad(run(x).square().sum(), [x, *weights]))

    want = gradients(toy)
    got = gradients(torch.compile(toy, backend=fxfuse.Backend(compiler=compiler)))
    report = fxfuse.last_report()
    assert report is not None and report.refused == []
    assert [f.record.q.norm is not None for f in report.fused] == [True]
    assert_like(got, want)


@pytest.mark.cpu
@chains
def test_loops_are_as_exact_as_eager(toy: Attention) -> None:
    x = hidden_states()
    with torch.no_grad():
        exact = copy.deepcopy(toy).double()(x.double())
        got = torch.compile(toy, backend=fxfuse.Backend())(x)
        # Rounding to float32 alone, in a few dozen steps.
        assert_like(got.double(), exact, 1e-6)
        assert_like(toy(x).double(), exact, 1e-6)
    report = fxfuse.last_report()
    assert report is not None and [f.provider for f in report.fused] == ["loops"]


# --- layer norms that are none -----------------------------------------------------------------


def squares_with_the_mean(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x - x.mean(-1, keepdim=True)) * rstd * weight


def rows_with_their_mean(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight


def one_channel_less(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    variance = x.var(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + eps) * weight


def divided_by_one_channel_less(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Bessel's correction by hand: a norm of another size."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
    return centred * torch.rsqrt(variance + eps) * weight


def the_mean_of_the_head_before(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(x - x.roll(1, 1).mean(-1, keepdim=True), weight, eps)


def the_mean_of_the_token_before(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(x - x.mean(-1, keepdim=True).roll(1, 2), weight, eps)


def the_mean_over_tokens(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(x - x.mean(2, keepdim=True), weight, eps)


def the_mean_over_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(x - x.mean(1, keepdim=True), weight, eps)


def the_mean_of_half_the_head(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(x - x[..., :8].mean(-1, keepdim=True), weight, eps)


def half_the_mean(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(x - 0.5 * x.mean(-1, keepdim=True), weight, eps)


def the_mean_added(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(x + x.mean(-1, keepdim=True), weight, eps)


def squares_of_half_the_head(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred[..., :8].square().mean(-1, keepdim=True) + eps) * weight


def transposed_means(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """With as many heads as tokens."""
    return rsqrt(x - x.mean(-1, keepdim=True).transpose(1, 2), weight, eps)


NO_LAYER_NORM = [
    squares_with_the_mean, rows_with_their_mean, one_channel_less, divided_by_one_channel_less,
    the_mean_of_the_head_before, the_mean_of_the_token_before, the_mean_over_tokens,
    the_mean_over_heads, the_mean_of_half_the_head, half_the_mean, the_mean_added,
    squares_of_half_the_head, transposed_means,
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("norm", NO_LAYER_NORM, ids=lambda f: f.__name__)
def test_what_looks_like_a_layer_norm_is_not_taken_for_one(
    norm: Any, after: bool, caplog: Any
) -> None:
    toy = Attention(norm=norm, after=after, eps=(0.5, 0.5), sizes=Sizes(4, 4))
    report = compiled_like_eager(toy, hidden_states(4))
    assert report.fused and "an error of fxfuse" not in caplog.text
    for fused in report.fused:
        taken = fused.record.q.norm is not None and fused.record.q.norm.kind == "layer"
        # A constant factor of the variance is read.
        assert taken == (norm is divided_by_one_channel_less)


@pytest.mark.parametrize("after", [False, True])
def test_a_bias_before_the_weight(after: bool) -> None:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return (F.layer_norm(x, (x.shape[-1],), None, None, eps) + weight / 2) * weight

    report = compiled_like_eager(Attention(norm=norm, after=after), hidden_states())
    for fused in report.fused:
        want = Norm("head", "after", False, kind="layer", has_bias=True) if after else None
        assert fused.record.q.norm == want, "the weight behind the bias stays the model's"


def test_a_bias_on_the_other_side_of_the_rotation_is_no_norms() -> None:
    toy = Attention(norm=layer)
    toy.between = lambda q, k: (q + toy.q_weight, k + toy.k_weight)
    report = compiled_like_eager(toy, hidden_states())
    assert [f.record.q.norm.has_bias for f in report.fused] == [False]


def test_a_bias_whose_scale_is_another() -> None:
    """A row scale on the norm alone, and one on both."""
    toy = Attention(norm=lambda x, w, eps: layer(x, w, eps) * 0.5 + w / 2)
    report = compiled_like_eager(toy, hidden_states())
    assert all(f.record.q.norm is None for f in report.fused)
    torch._dynamo.reset()
    toy = Attention(norm=lambda x, w, eps: (layer(x, w, eps) + w / 2) * 0.5)
    (fused,) = compiled_like_eager(toy, hidden_states()).fused
    assert fused.record.q.norm.has_bias and fused.record.q.scale == 0.5
