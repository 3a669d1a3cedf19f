"""Sums and norms over the hidden width: the order of writes around them, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.norm_toys import Residual, compiled, pre_norm
from tests.toys import assert_like, hidden_states

pytestmark = pytest.mark.null


def written_sum(layer: Residual, x: Tensor, r: Tensor) -> Any:
    h = x + r
    h.mul_(2)
    return layer.norm(h), h


def written_after(layer: Residual, x: Tensor, r: Tensor) -> Any:
    h = x + r
    y = layer.norm(h)
    h.mul_(2)
    return y, h


def written_between(layer: Residual, x: Tensor, r: Tensor) -> Any:
    h = x + r
    rows = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    h[:, 0] = 7.0
    return h * rows


def written_addend(layer: Residual, x: Tensor, r: Tensor) -> Any:
    h = x + r
    r.mul_(2)
    return layer.norm(h), r


def written_through_a_view(layer: Residual, x: Tensor, r: Tensor) -> Any:
    h = x + r
    part = h.view(-1, 32)[1:]
    y = layer.norm(h)
    part.zero_()
    return y, h


def written_result(layer: Residual, x: Tensor, r: Tensor) -> Any:
    y = layer.norm(x + r)
    z = y.view(-1)
    z[:5] = 1.0
    return y


def added_in_place(layer: Residual, x: Tensor, r: Tensor) -> Any:
    h = layer.first(x)
    h += r
    y = layer.norm(h)
    h += layer.second(y)
    return layer.norm(h, 1), h


WRITES = [written_sum, written_after, written_between, written_addend, written_result]
WRITES += [written_through_a_view, added_in_place]


@pytest.mark.parametrize("run", WRITES, ids=lambda f: f.__name__)
def test_writes_in_between_keep_their_order(run: Any) -> None:
    report = compiled(Residual(run), hidden_states(), hidden_states(seed=2), strict=True)
    assert len(report.fused) == (run in (written_after, written_addend))


# --- gradients ---------------------------------------------------------------------------------


def test_gradients_are_eagers() -> None:
    torch._dynamo.reset()
    toy, x = Residual(pre_norm), hidden_states()
    toy(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in toy.named_parameters() if p.grad is not None}
    toy.zero_grad()
    backend = fxfuse.Backend(compiler="aot_eager", gate="always")
    torch.compile(toy, backend=backend)(x).square().sum().backward()
    report = fxfuse.last_report()
    assert report is not None and len(report.fused) == 3
    for name, parameter in toy.named_parameters():
        assert_like(parameter.grad, want[name], 1e-4)


def test_a_sum_without_gradients_is_left_out() -> None:
    def run(layer: Residual, x: Tensor) -> Any:
        with torch.no_grad():
            h = x + layer.first(x)
        return layer.norm(h)

    torch._dynamo.reset()
    toy, x = Residual(run), hidden_states()
    toy(x).sum().backward()
    want = {n: p.grad.clone() for n, p in toy.named_parameters() if p.grad is not None}
    toy.zero_grad()
    torch.compile(toy, backend=fxfuse.Backend(compiler="aot_eager", gate="always"))(
        x
    ).sum().backward()
    got = {n: p.grad for n, p in toy.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert_like(got[name], grad, 1e-4)
