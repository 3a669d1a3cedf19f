"""The Triton kernel on a GPU, through torch.compile: exact, deterministic, replayable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxfuse.lowering import providers
from tests.sites import SITES, Operands, operands, untouched

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


def compiled(case: Operands, **options):
    op = case.op()
    return torch.compile(lambda args: op(*args), **options)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).square().mean().sqrt())


def assert_agree(case: Operands, results, before: Operands) -> None:
    assert providers.chosen and all(c.provider == "triton" for c in providers.chosen)
    wide, wanted = before.exact()
    eager = before.op()(*before.arguments())
    pairs = [(results[0], eager[0], wanted[0])]
    if results[1].dim() == 4:
        pairs.append((results[1], eager[1], wanted[1]))
    for cache in ("k_cache", "v_cache") if case.stores else ():
        if case.tensors[cache] is not None:
            pairs.append((case.numbers(cache), before.numbers(cache), wide.tensors[cache]))
    for got, plain, want in pairs:
        assert got.double().isfinite().all() and got.shape == plain.shape
        # The plain path is float32 with one rounding too: the kernel may add 5 % to its error,
        # and a float32 ulp where that error is next to nothing.
        assert error(got, want) <= 1.05 * error(plain, want) + 3e-7 * float(want.abs().max())
    assert not case.stores or untouched(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SITES)
def test_error_is_within_that_of_the_plain_path(name, dtype):
    case = operands(name, heads=16, kv_heads=8, tokens=7, slots=32, dtype=dtype, device="cuda")
    before = case.copy()
    assert_agree(case, compiled(case)(list(case.arguments())), before)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(SITES)),
    batch=st.integers(0, 3),
    tokens=st.integers(0, 70),
    heads=st.integers(1, 20),
    kv_heads=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(name, batch, tokens, heads, kv_heads, dtype):
    case = operands(name, batch, tokens, heads, kv_heads, 80, dtype, "cuda")
    before = case.copy()
    torch._dynamo.reset()
    results = compiled(case, dynamic=False)(list(case.arguments()))
    if results[0].numel():
        assert_agree(case, results, before)


@pytest.mark.parametrize("name", ["qwen3", "flat cache by position", "mrope"])
def test_through_the_cpp_wrapper(name):
    case = operands(name, tokens=5, slots=32, dtype=torch.bfloat16, device="cuda")
    before = case.copy()
    run = compiled(case, options={"cpp_wrapper": True})
    assert_agree(case, run(list(case.arguments())), before)


def test_two_runs_are_bitwise_equal():
    case = operands("qwen3", tokens=64, heads=16, kv_heads=8, slots=128, dtype=torch.bfloat16,
                    device="cuda")  # fmt: skip
    again = case.copy()
    run = compiled(case)
    first, second = run(list(case.arguments())), run(list(again.arguments()))
    assert torch.equal(first[0], second[0])
    assert torch.equal(case.tensors["k_cache"], again.tensors["k_cache"])


@pytest.mark.parametrize("numbers", [(4, 6, 33, 70), (1000, 5, 333)], ids=["few", "many"])
def test_one_kernel_for_every_number_of_tokens(numbers):
    run = None
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    for tokens in numbers:
        case = operands("qwen3", tokens=tokens, slots=1024, dtype=torch.bfloat16, device="cuda")
        before = case.copy()
        for name in ("q", "k", "v", "cos", "sin"):
            torch._dynamo.mark_dynamic(case.tensors[name], 1)
        torch._dynamo.mark_dynamic(case.tensors["slots"], 1)
        run = run or compiled(case, backend=counter)
        assert_agree(case, run(list(case.arguments())), before)
    assert counter.frame_count == 1


def test_a_cache_beyond_two_to_the_31_elements():
    case = operands("qwen3", batch=1, tokens=2, heads=4, kv_heads=2, dtype=torch.bfloat16,
                    device="cuda")  # fmt: skip
    slots = 2**31 // (2 * 128) + 5
    case.tensors["k_cache"] = torch.zeros(1, 2, slots, 128, dtype=torch.bfloat16, device="cuda")
    case.tensors["v_cache"] = case.tensors["k_cache"].clone()
    case.tensors["slots"] = torch.tensor([[slots - 1, 3]], device="cuda")
    compiled(case)(list(case.arguments()))
    small = operands("qwen3", batch=1, tokens=2, heads=4, kv_heads=2, dtype=torch.bfloat16,
                     device="cuda")  # fmt: skip
    small.tensors["slots"] = torch.tensor([[8, 3]], device="cuda")
    compiled(small)(list(small.arguments()))
    for cache in ("k_cache", "v_cache"):
        large, little = case.tensors[cache], small.tensors[cache]
        assert torch.equal(large[:, :, [slots - 1, 3]], little[:, :, [8, 3]])
        assert torch.count_nonzero(large) == torch.count_nonzero(little[:, :, [8, 3]])


def test_reduce_overhead_replays_with_changed_inputs_and_is_not_skipped():
    from torch._dynamo.utils import counters

    case = operands("qwen3", tokens=1, heads=16, kv_heads=8, slots=32, dtype=torch.bfloat16,
                    device="cuda")  # fmt: skip
    for cache in ("k_cache", "v_cache"):
        torch._dynamo.mark_static_address(case.tensors[cache])
    run = compiled(case, mode="reduce-overhead")
    counters.clear()
    for step in range(6):
        other = operands("qwen3", tokens=1, heads=16, kv_heads=8, slots=32, dtype=torch.bfloat16,
                         device="cuda", seed=step)  # fmt: skip
        caches = {c: case.tensors[c] for c in ("k_cache", "v_cache")}
        for cache in caches.values():
            cache.fill_(77.0)
        other.tensors |= caches
        before = other.copy()
        torch.compiler.cudagraph_mark_step_begin()
        results = [r.clone() for r in run(list(other.arguments()))]
        assert_agree(other, results, before)
    assert counters["inductor"]["cudagraph_skips"] == 0
