"""Gradients, and regions of a graph: grad modes, autocast. What is fused there has eager's
gradients; what would not is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fxfuse
from tests.spellings import llama, rsqrt
from tests.toys import Attention, Layer, assert_like, by_index_copy, hidden_states, stages

T = 5
pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("after", [False, True])
def test_gradients_equal_eagers(compiler: str, after: bool) -> None:
    toy = Attention(norm=rsqrt, after=after)

    def gradients(run: Any) -> list[Tensor]:
        x = hidden_states().requires_grad_()
        weights = list(toy.parameters())
        result = run(x)
        return list(torch.autograd.grad((result * result).sum(), [x, *weights]))

    want = gradients(toy)
    got = gradients(torch.compile(toy, backend=fxfuse.Backend(compiler=compiler)))
    report = fxfuse.last_report()
    assert report is not None and len(report.fused) == 1
    assert_like(got, want)


def test_no_store_is_fused_where_gradients_are_needed() -> None:
    layer = Layer(by_index_copy)
    memory = [torch.zeros(2, 2, 12, 16), torch.zeros(2, 2, 12, 16), torch.arange(T)]
    torch.compile(layer, backend=fxfuse.Backend(compiler="eager"))(hidden_states(T), *memory)
    report = fxfuse.last_report()
    assert report is not None and stages(report) == [""]
    assert "cache writes stay the model's" in report.notes[0]


def test_a_region_without_gradients() -> None:
    class Region(Attention):
        def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                k = llama(k, cos, sin)
            return llama(q, cos, sin), k

    toy = Region()

    def gradient(run: Any) -> Tensor:
        x = hidden_states().requires_grad_()
        return torch.autograd.grad(run(x).square().sum(), x)[0]

    assert_like(
        gradient(torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))), gradient(toy)
    )


class Detached(Attention):
    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return llama(q.detach(), cos, sin), llama(k, cos, sin)


def norm_without_its_gradient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    with torch.no_grad():
        factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * factor * weight


@pytest.mark.parametrize(
    ("toy", "reason"),
    [
        (Detached(), "a detached value"),
        (Attention(norm=norm_without_its_gradient), "in part without gradients"),
    ],
)
def test_a_chain_whose_gradient_is_cut_is_refused(toy: Any, reason: str) -> None:
    def gradient(run: Any) -> Tensor:
        x = hidden_states().requires_grad_()
        return torch.autograd.grad(run(x).square().sum(), x)[0]

    compiled = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))
    assert_like(gradient(compiled), gradient(toy))
    assert any(reason in r.reason for r in fxfuse.last_report().refused)


@torch.no_grad()
def test_an_autocast_region_is_right() -> None:
    toy, x = Attention(norm=rsqrt), hidden_states()

    def run(y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return toy(y)

    got = torch.compile(run, backend=fxfuse.Backend(compiler="eager"))(x)
    # bfloat16 keeps 8 bits: two orders of rounding differ by some 2 ** -8.
    assert_like(got, run(x), tolerance=1e-2)


# --- code that Dynamo keeps in graphs of its own -----------------------------------------------


def gradients(run: Any, toy: Attention) -> list[Tensor]:
    x = hidden_states().requires_grad_()
    weights = list(toy.parameters())
    return list(torch.autograd.grad(run(x).square().sum(), [x, *weights], allow_unused=False))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_checkpointed_layer_has_eagers_gradients(compiler: str) -> None:
    toy = Attention(norm=rsqrt)

    def run(x: Tensor) -> Tensor:
        return checkpoint(toy, x, use_reentrant=False) + x.sum()

    want = gradients(run, toy)
    got = gradients(torch.compile(run, backend=fxfuse.Backend(compiler=compiler)), toy)
    assert_like(got, want)


def test_torch_func_sees_through_a_compiled_layer() -> None:
    toy = Attention(norm=rsqrt)

    def loss(x: Tensor) -> Tensor:
        return toy(x).square().sum()

    want = torch.func.grad(loss)(hidden_states())
    run = torch.compile(torch.func.grad(loss), backend=fxfuse.Backend(compiler="eager"))
    assert_like(run(hidden_states()), want)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_a_mapped_layer_is_right() -> None:
    toy, x = Attention(norm=rsqrt), hidden_states(batch=6).unflatten(0, (3, 2))
    mapped = torch.func.vmap(toy)
    got = torch.compile(mapped, backend=fxfuse.Backend(compiler="eager"))(x)
    assert_like(got, mapped(x))


@torch.no_grad()
def test_a_chain_in_a_branch_is_right() -> None:
    toy, x = Attention(norm=rsqrt), hidden_states()

    def run(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 1e9, lambda y: toy(y) * 2, lambda y: toy(y), (x,))

    got = torch.compile(run, backend=fxfuse.Backend(compiler="eager"))(x)
    assert_like(got, run(x))


@torch.no_grad()
def test_a_graph_that_breaks_inside_a_chain_is_right() -> None:
    """What stands in one graph is fused there."""

    def breaking(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        torch._dynamo.graph_break()
        return q, k

    toy, x = Attention(norm=rsqrt, between=breaking), hidden_states()
    report = fxfuse.explain(toy, x, compiler="eager")
    assert report.graphs > 1 and [f.stages for f in report.fused] == [("rms_norm", "rope")]
    got = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))(x)
    assert_like(got, toy(x))
