"""A training step of a whole model: eager's gradients, with checkpointed layers and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fxfuse
from tests.models.families import FAMILIES
from tests.models.tiny import assert_close, build, relative_error, token_ids
from tests.spellings import llama, rsqrt
from tests.toys import Attention, assert_like, hidden_states

IDS = token_ids(7)
COMPILERS = pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("aot_eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=[pytest.mark.cpu, pytest.mark.long]),
    ],
)


def step(model: Any, run: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter."""
    model.zero_grad()
    loss = run(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same_step(got: Any, want: Any) -> None:
    """float32, and eager in another order of sums: 1e-5."""
    assert_close(got[0], want[0], "loss", tolerance=1e-5)
    for name, gradient in want[1].items():
        assert_close(got[1][name], gradient, name, tolerance=1e-5)


@COMPILERS
@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(x, marks=pytest.mark.long) for x in ("gemma3", "olmo2"))]
)
def test_a_training_step(name: str, compiler: str) -> None:
    model = build(FAMILIES[name]).train()
    want, before = step(model, model), fxfuse.counts()["attention"]
    run = torch.compile(model, backend=fxfuse.Backend(compiler=compiler, strict=True))
    assert_same_step(step(model, run), want)
    assert fxfuse.counts()["attention"] - before == FAMILIES[name].rotary


@COMPILERS
def test_checkpointed_layers(compiler: str) -> None:
    """transformers' gradient_checkpointing_enable: each layer is a graph inside the graph."""
    model = build(FAMILIES["qwen3"]).train()
    want = step(model, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = fxfuse.counts()["attention"]
    run = torch.compile(model, backend=fxfuse.Backend(compiler=compiler, strict=True))
    assert_same_step(step(model, run), want)
    assert fxfuse.counts()["attention"] - before == FAMILIES["qwen3"].rotary
    report = fxfuse.last_report()
    assert report is not None and len(report.notes) == 1


class Paired(Attention):
    """Its rotation has no partner, so that it is none; or has one."""

    def __init__(self, partner: bool) -> None:
        super().__init__(norm=rsqrt)
        self.partner = partner

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if self.partner:
            return super().rotate(q, k, cos, sin)
        return q * cos + q * sin, k * cos + k * sin


@pytest.mark.null
@pytest.mark.parametrize("partner", [True, False])
def test_what_is_refused_in_a_checkpoint_is_told(partner: bool) -> None:
    toy, x = Paired(partner), hidden_states().requires_grad_()

    def run(x: Tensor) -> Tensor:
        inner = checkpoint(
            lambda y: checkpoint(toy, y, use_reentrant=False), x, use_reentrant=False
        )
        return inner.square().sum()

    report = fxfuse.explain(run, x, compiler="aot_eager")
    assert len(report.fused) == partner and len(report.refused) == 2 * (not partner)
    got = torch.autograd.grad(
        torch.compile(run, backend=fxfuse.Backend(compiler="aot_eager"))(x), toy.parameters()
    )
    assert_like(list(got), list(torch.autograd.grad(run(x), toy.parameters())))


@pytest.mark.null
def test_three_steps_of_an_optimizer() -> None:
    """The weights that training moves are those that the compiled graph reads."""
    models = [build(FAMILIES["qwen3"]).train() for _ in range(2)]
    runs = [models[0], torch.compile(models[1], backend=fxfuse.Backend(compiler="aot_eager"))]
    before, losses = fxfuse.counts()["attention"], []
    for model, run in zip(models, runs, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            losses.append(step(model, run)[0])
            optimizer.step()
    assert fxfuse.counts()["attention"] - before == FAMILIES["qwen3"].rotary
    assert relative_error(losses[2], losses[0]) > 0.01
    for got, want in zip(losses[3:], losses[:3], strict=True):
        assert_close(got, want, "loss", tolerance=1e-5)


@pytest.mark.null
def test_a_step_under_autocast() -> None:
    """bfloat16 keeps 8 bits: gradients of two orders of rounding differ by a few of them."""
    model = build(FAMILIES["qwen3"]).train()
    truth = step(model, model)[1]

    def autocast(run: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return run(*args, **kwargs)

        return call

    before = fxfuse.counts()["attention"]
    eager = step(model, autocast(model))[1]
    run = torch.compile(model, backend=fxfuse.Backend(compiler="aot_eager", strict=True))
    got = step(model, autocast(run))[1]
    assert fxfuse.counts()["attention"] - before == FAMILIES["qwen3"].rotary

    def error(gradients: dict[str, Tensor]) -> float:
        return max(relative_error(gradients[n], truth[n]) for n in truth)

    assert error(got) <= 1.5 * error(eager)


@pytest.mark.null
def test_a_checkpointed_body_that_writes_to_what_it_turned() -> None:
    """By another name: the rotation reads q as it was before."""
    q, (cos, sin) = hidden_states(width=16), torch.randn(2, 5, 16)

    def body(q: Tensor, y: Tensor) -> Tensor:
        turned = llama(q, cos, sin)
        y.mul_(2)
        return turned.exp()

    def run(q: Tensor) -> Tensor:
        return checkpoint(body, q, q[:1], use_reentrant=False)

    with torch.no_grad():
        want = run(q.clone())
        got = torch.compile(run, backend=fxfuse.Backend(compiler="eager"))(q)
    assert_like(got, want)
