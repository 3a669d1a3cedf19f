"""Norms without a rotation through Inductor on the CPU: no further from float64 than without us."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import fxfuse
from fxfuse.lowering import providers
from tests.add_norms import CASES, EPS
from tests.norm_toys import NormedAttention, Residual, pre_norm
from tests.toys import hidden_states

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True, scope="module")
def registered():
    providers.register()
    with torch.no_grad(), fresh_cache():
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def parallel_and_read(layer: Residual, x: Tensor) -> Any:
    h = x + layer.first(x) + layer.second(x)
    return layer.norm(h), h


def errors(toy: nn.Module, x: Tensor, **settings: Any) -> list[tuple[float, float]]:
    """(ours, the larger of eager's and stock Inductor's) for each result, against float64."""
    exact = copy.deepcopy(toy).double()(x.double())
    runs = []
    for backend in (fxfuse.Backend(gate="always", **settings), None, "inductor"):
        torch._dynamo.reset()
        run = torch.compile(toy, backend=backend) if backend else toy
        runs.append(run(x))

    def error(got: Tensor, want: Tensor) -> float:
        return float((got.double() - want).square().mean().sqrt())

    every = [list(r) if isinstance(r, tuple) else [r] for r in (*runs, exact)]
    return [(error(a, w), max(error(b, w), error(c, w))) for a, b, c, w in zip(*every, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("toy", "kinds"),
    [
        (Residual(pre_norm, width=96), ["add_rms_norm"] * 3),
        (Residual(parallel_and_read, width=96), ["add_rms_norm"]),
        (NormedAttention(), ["norm"]),
    ],
    ids=["residual stream", "parallel", "q and k"],
)
def test_error_is_within_that_of_eager_and_inductor(toy: Any, kinds: list[str], dtype: Any) -> None:
    toy = copy.deepcopy(toy).to(dtype)
    x = hidden_states(9, width=96 if isinstance(toy, Residual) else 32).to(dtype)
    for ours, theirs in errors(toy, x):
        # 5 %, and a float32 ulp of results near 1 where all errors are next to nothing.
        assert ours <= 1.05 * theirs + 2e-7
    torch._dynamo.reset()
    torch.compile(toy, backend=fxfuse.Backend(gate="always"))(x)
    report = fxfuse.last_report()
    assert report is not None and [f.kind for f in report.fused] == kinds
    assert {f.provider for f in report.fused} == {"loops"}


@pytest.mark.parametrize("name", ["llama", "first norm", "parallel", "mixed", "half"])
def test_the_op_as_loops(name: str) -> None:
    case = CASES[name]
    tensors = case.tensors()
    args = [tensors.get(n) for n in ("x", "residual", "second", "weight")]
    op, text = torch.ops.fxfuse.add_rms_norm.default, case.record.to_text()
    total, normed = torch.compile(lambda args: op(*args, EPS, text))(args)
    want_total, want = case.exact(tensors)
    # Inductor may keep the sum unrounded for the norm: a rounding of it, and one of the result.
    rounds = 2**-8 if torch.bfloat16 in (normed.dtype, want_total.dtype) else 2**-10
    torch.testing.assert_close(normed.double(), want, rtol=2 * rounds, atol=2 * rounds)
    if case.record.keep_sum:
        rounds = torch.finfo(want_total.dtype).eps
        torch.testing.assert_close(total, want_total, rtol=rounds, atol=rounds)


def test_one_graph_for_every_number_of_tokens() -> None:
    toy = Residual(pre_norm)
    run = torch.compile(toy, backend=fxfuse.Backend(gate="always"), dynamic=True)
    for tokens in (4, 9, 30):
        torch.testing.assert_close(run(hidden_states(tokens)), toy(hidden_states(tokens)))
    report = fxfuse.last_report()
    assert report is not None and len(report.fused) == 3
