"""Norms over the hidden width and the sums in front of them: found, left, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from fxfuse.patterns.record import AddNorm, Norm
from tests.norm_toys import Residual, compiled, pre_norm
from tests.spellings import NORMS, Normed, gemma, rsqrt, squeezed, weightless
from tests.toys import Attention, hidden_states

pytestmark = pytest.mark.null


def records(report: fxfuse.Report) -> list[AddNorm]:
    found = [f.record for f in report.fused]
    assert all(isinstance(r, AddNorm) for r in found)
    return [r for r in found if isinstance(r, AddNorm)]


def sums(run: Any, *inputs: Tensor, norm: Normed = rsqrt) -> list[tuple[int, bool]]:
    """(addends, whether the sum is returned) of each site."""
    report = compiled(Residual(run, norm), *(inputs or (hidden_states(),)))
    assert report.refused == []
    return [(r.addends, r.keep_sum) for r in records(report)]


# One more axis in front of three: its result is no row of the hidden state's shape.
@pytest.mark.parametrize("norm", [n for n in NORMS if n is not squeezed], ids=lambda n: n.__name__)
def test_each_spelling_in_a_residual_stream(norm: Normed) -> None:
    report = compiled(Residual(pre_norm, norm), hidden_states())
    plain = Norm("head", "before", has_weight=True)
    assert records(report) == [
        AddNorm(32, plain, 1),
        AddNorm(32, plain, 2, keep_sum=True),
        AddNorm(32, plain, 2),
    ]
    assert [f.stages for f in report.fused] == [("rms_norm",), *[("add", "rms_norm")] * 2]
    assert report.fused[0].eps == (1e-5,)


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [(gemma, Norm("head", "before", True, 1.0)), (weightless, Norm("head", "before", False))],
)
def test_weights_that_add_one_and_none_at_all(norm: Normed, wanted: Norm) -> None:
    report = compiled(Residual(pre_norm, norm), hidden_states())
    assert {r.norm for r in records(report)} == {wanted}


# --- sums --------------------------------------------------------------------------------------


def parallel(layer: Residual, x: Tensor) -> Any:
    return layer.norm(x + layer.first(x) + layer.second(x))


def parallel_from_the_right(layer: Residual, x: Tensor) -> Any:
    return layer.norm(x + (layer.first(x) + layer.second(x)))


def inner_sum_read(layer: Residual, x: Tensor) -> Any:
    h = layer.first(x) + layer.second(x)
    return layer.norm(x + h), h


def sum_returned(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    return h, layer.norm(h)


def sum_read_in_between(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    other = h.sum(-1)
    return layer.norm(h), other


def sum_seen_through_a_view(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    flat = h.view(-1, 32)
    return layer.norm(h), flat[0], h[..., :4]


def twice_itself(layer: Residual, x: Tensor) -> Any:
    y = layer.first(x)
    return layer.norm(y + y)


def four_times_itself(layer: Residual, x: Tensor) -> Any:
    y = x + layer.first(x)
    return layer.norm(y + y)


def with_alpha(layer: Residual, x: Tensor) -> Any:
    return layer.norm(torch.add(x, layer.first(x), alpha=2))


def both_results_read_twice(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    y = layer.norm(h)
    return layer.first(y) + layer.second(y) + h, h * 2


def two_weights_of_one_statistic(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return n * layer.weights[0], n * layer.weights[1]


def normed_twice(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    return layer.norm(h, 0), layer.norm(h, 1)


def later_reader_first(layer: Residual, x: Tensor) -> Any:
    """The second op stands before the first reader of the first norm."""
    h = x + layer.first(x)
    y = layer.norm(h, 0)
    z = layer.norm(h + layer.second(x), 1)
    return layer.second(z), layer.first(y)


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (parallel, [(3, False)]),
        (parallel_from_the_right, [(3, False)]),
        (inner_sum_read, [(2, False)]),
        (sum_returned, [(2, True)]),
        (sum_read_in_between, [(2, True)]),
        (sum_seen_through_a_view, [(2, True)]),
        (with_alpha, [(1, False)]),
        (both_results_read_twice, [(2, True)]),
        (two_weights_of_one_statistic, [(2, True)]),
        (later_reader_first, [(2, True), (2, False)]),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_sums(run: Any, wanted: list[tuple[int, bool]]) -> None:
    assert sums(run) == wanted


@pytest.mark.parametrize(
    ("run", "wanted"),
    [(twice_itself, []), (four_times_itself, []), (normed_twice, [(2, True)] * 2)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_sums_of_one_tensor(run: Any, wanted: list[tuple[int, bool]]) -> None:
    assert sums(run) == wanted


def test_a_sum_of_two_dtypes_is_rounded_as_the_graph_rounds_it() -> None:
    def run(layer: Residual, x: Tensor, r: Tensor) -> Any:
        h = x + r
        return h, layer.norm(h)

    report = compiled(Residual(run), hidden_states(), hidden_states(seed=2).bfloat16())
    assert [r.addends for r in records(report)] == [2]


def test_every_number_of_tokens() -> None:
    x = hidden_states(6)
    torch._dynamo.mark_dynamic(x, 1)
    assert len(records(compiled(Residual(pre_norm), x))) == 3


def test_a_square_that_is_asked_for_its_dtype_alone() -> None:
    """The node stays, and stands before the op that makes the sum it reads."""

    def run(layer: Residual, x: Tensor) -> Any:
        h = x + layer.first(x)
        square = h.pow(2)
        y = h * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-5)
        return y.sum(-1), h, torch.arange(3).type_as(square)

    report = compiled(Residual(run), hidden_states())
    assert [(r.addends, r.keep_sum) for r in records(report)] == [(2, True)] and not report.notes


@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32), (2, 3, 5, 32)])
def test_rows_of_one_to_three_axes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert len(records(compiled(Residual(pre_norm), x))) == 3


def test_a_norm_under_a_rotation_is_no_site_of_its_own() -> None:
    """A q that is the hidden state itself, without a projection."""
    report = compiled(Attention(norm=rsqrt), hidden_states())
    assert [f.kind for f in report.fused] == ["attention"]


# --- what is not the target --------------------------------------------------------------------


def of_another_tensor(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    return h * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * layer.weights[0]


def eps_outside(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    return h * (torch.rsqrt(h.pow(2).mean(-1, keepdim=True)) + 1e-5)


def over_tokens(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    return h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-5)


def over_both(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    return h * torch.rsqrt(h.pow(2).mean((1, 2), keepdim=True) + 1e-5)


def over_half(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    return h * torch.rsqrt(h[..., :16].pow(2).mean(-1, keepdim=True) + 1e-5)


def of_the_next_row(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5).roll(1, 1)


def turned_channels(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    return h.flip(-1) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)


def of_deviations(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    h = h - h.mean(-1, keepdim=True)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)


def gated(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x)
    rows = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return h * rows * layer.second(x).sigmoid()


@pytest.mark.parametrize(
    "run",
    [over_tokens, over_both, over_half, eps_outside, of_another_tensor],
    ids=lambda f: f.__name__,
)
def test_what_looks_like_a_norm_and_is_not(run: Any) -> None:
    report = compiled(Residual(run), hidden_states(), strict=True)
    assert report.fused == []


@pytest.mark.parametrize(
    "run", [of_the_next_row, turned_channels, of_deviations, gated], ids=lambda f: f.__name__
)
def test_what_is_a_norm_in_part_has_eagers_result(run: Any) -> None:
    report = compiled(Residual(run), hidden_states(), strict=True)
    assert len(report.fused) == (run is gated)


def test_a_weight_that_comes_too_late() -> None:
    def run(layer: Residual, x: Tensor, w: Tensor) -> Any:
        h = x + layer.first(x)
        early = h.sum(-1)
        return early, h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * weight(layer)

    def weight(layer: Residual) -> Tensor:
        return layer.weights[0] * layer.weights[1]

    report = compiled(Residual(run), hidden_states(), hidden_states())
    assert [r.reason for r in report.refused] == [
        "mul_1 is computed after the first use of the result"
    ]


def test_a_residual_that_lies_elsewhere_in_memory() -> None:
    def run(layer: Residual, x: Tensor, r: Tensor) -> Any:
        h = x + r.transpose(0, 1)[..., 1:33]
        return layer.norm(h), h

    report = compiled(Residual(run), hidden_states(5, 2), hidden_states(2, 5, 40))
    assert [(r.addends, r.keep_sum) for r in records(report)] == [(2, True)]


def in_another_order(layer: Residual, x: Tensor) -> Any:
    return layer.norm(x.transpose(0, 1) + layer.first(x).transpose(0, 1))


def moved(layer: Residual, x: Tensor) -> Any:
    return layer.norm(x.transpose(0, 1))


def of_a_bias(layer: Residual, x: Tensor) -> Any:
    return layer.norm(x + layer.weights[1])


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (in_another_order, "a result that does not lie row by row in memory"),
        (moved, "a norm of a tensor that is cut, moved or regrouped"),
        (of_a_bias, "a norm of a part of a tensor, or of one that no node of the graph holds"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_refusals_are_no_errors_under_strict(run: Any, reason: str) -> None:
    report = compiled(Residual(run), hidden_states(5, 5), strict=True)
    assert report.fused == []
    assert [(r.stage, r.reason) for r in report.refused] == [("norm", reason)]


def times_the_root_of_its_sum(layer: Residual, x: Tensor) -> Tensor:
    h = x + layer.first(x)
    return h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-3)


def test_a_multiple_of_the_statistic_is_refused() -> None:
    report = compiled(Residual(times_the_root_of_its_sum), hidden_states())
    assert report.fused == []
    assert [r.reason for r in report.refused] == [
        "a norm by an unknown width, or with a factor of its own"
    ]
