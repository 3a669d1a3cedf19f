"""The kernel of add_rms_norm on a GPU, through torch.compile: exact, deterministic, any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxfuse.lowering import providers
from tests.add_norms import BF16, CASES, EPS, PLAIN, Case, case

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]


@pytest.fixture(autouse=True, scope="module")
def registered():
    providers.register()
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo():
    # Nothing from a cache, so that every lowering is seen.
    torch._dynamo.reset()
    providers.chosen.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def run(case: Case, tensors, **options):
    """Results of the op through Inductor."""
    op, text = torch.ops.fxfuse.add_rms_norm.default, case.record.to_text()
    args = [tensors.get(n) for n in ("x", "residual", "second", "weight")]
    return torch.compile(lambda args: op(*args, EPS, text), **options)(args)


def assert_agree(case: Case, tensors, results) -> None:
    assert providers.chosen and all(c.provider == "triton" for c in providers.chosen)
    total, want = case.exact(tensors)
    if case.record.keep_sum:
        # The same additions, rounded at the same places.
        assert torch.equal(results[0], total)
    plain = want.to(results[1].dtype)
    error = (results[1].double() - want).square().mean().sqrt()
    best = (plain.double() - want).square().mean().sqrt()
    # One rounding of the exact result, and float32 inside: 5 % and a float32 ulp above it.
    assert results[1].isfinite().all()
    assert float(error) <= 1.05 * float(best) + 3e-7 * float(want.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_error_is_that_of_one_rounding(name):
    tensors = CASES[name].tensors("cuda")
    assert_agree(CASES[name], tensors, run(CASES[name], tensors))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 7, 700]),
    channels=st.sampled_from([1, 24, 1000, 2880, 4096, 16384]),
    addends=st.integers(1, 3),
    laid=st.sampled_from(["dense", "wide", "turned"]),
)
def test_any_shape(batch, tokens, channels, addends, laid):
    torch._dynamo.reset()
    drawn = case(PLAIN, (BF16,) * addends, (batch, tokens, channels), laid)
    tensors = drawn.tensors("cuda")
    assert_agree(drawn, tensors, run(drawn, tensors, dynamic=False))


def test_two_runs_are_bitwise_equal():
    tensors = CASES["llama"].tensors("cuda")
    first, second = (run(CASES["llama"], tensors) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_one_kernel_for_every_number_of_tokens():
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    op = torch.ops.fxfuse.add_rms_norm.default
    text = CASES["llama"].record.to_text()
    compiled = torch.compile(lambda args: op(*args, EPS, text), backend=counter)
    for tokens in (4, 33, 2000):
        drawn = case(PLAIN, (BF16, BF16), (2, tokens, 320))
        tensors = drawn.tensors("cuda")
        for name in ("x", "residual"):
            torch._dynamo.mark_dynamic(tensors[name], 1)
        args = [tensors.get(n) for n in ("x", "residual", "second", "weight")]
        assert_agree(drawn, tensors, compiled(args))
    assert counter.frame_count == 1
