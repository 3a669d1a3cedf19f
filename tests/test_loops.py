"""The ops compiled by Inductor for the CPU: equal to the reference, caches written in place."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._inductor.utils import fresh_cache, run_and_get_code

import fxfuse.ops  # noqa: F401
from fxfuse.lowering import providers
from tests.sites import SITES, Operands, operands, untouched

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True, scope="module")
def registered():
    providers.register()
    with torch.no_grad(), fresh_cache():
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def call(case: Operands):
    op = case.op()
    tensors = list(case.arguments())

    def run(args):
        return op(*args)

    return run, tensors


def assert_agree(case: Operands, results, before: Operands) -> None:
    wide, wanted = before.exact()
    dtype = case.tensors["q"].dtype
    # One rounding of the result, and float32 sums of up to 128 terms before it.
    close = {"rtol": max(2**-8 if dtype == torch.bfloat16 else 0, 1e-5), "atol": 1e-5}
    torch.testing.assert_close(results[0].double(), wanted[0], **close)
    if results[1].dim() == 4:
        torch.testing.assert_close(results[1].double(), wanted[1], **close)
    if case.stores:
        assert untouched(case)
        for cache in ("k_cache", "v_cache"):
            if case.tensors[cache] is not None:
                got = case.numbers(cache)
                rounded = dict(close)
                if got.element_size() == 1:
                    # Half a step of the format, and of its smallest numbers.
                    of = torch.finfo(got.dtype)
                    rounded = {"rtol": of.eps / 2 + 1e-5, "atol": of.smallest_normal * of.eps / 2}
                torch.testing.assert_close(got.double(), wide.tensors[cache], **rounded)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        "llama",
        "gptj, partial",
        "olmo2",
        "halves to neighbours",
        "phi",
        "chameleon",
        "zaya",
        "mla",
        "flat cache by position",
        "mrope",
        "mrope, every third",
        "mrope, in turns",
    ],
)
def test_compiled_equals_the_reference(name):
    case = operands(name)
    before = case.copy()
    run, args = call(case)
    results = torch.compile(run)(args)
    assert_agree(case, results, before)
    eager = case.op()(*before.arguments())
    for got, want in zip(results, eager, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert got.stride() == want.stride()


def test_the_store_is_in_place_and_rows_are_written_once():
    case = operands(
        "qwen3", batch=1, tokens=4, heads=16, kv_heads=8, slots=512, dtype=torch.bfloat16
    )
    before = case.copy()
    run, args = call(case)
    addresses = [case.tensors[c].data_ptr() for c in ("k_cache", "v_cache")]
    results, (code,) = run_and_get_code(torch.compile(run), args)
    assert_agree(case, results, before)
    assert [case.tensors[c].data_ptr() for c in ("k_cache", "v_cache")] == addresses
    buffers = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", code)
    sizes = [torch.Size(int(n) for n in re.findall(r"\d+", b)).numel() for b in buffers]
    # Nothing is larger than q itself: no copy of a cache, no float32 twin of a row.
    assert sizes and max(sizes) == case.tensors["q"].numel()
    assert sizes.count(case.tensors["q"].numel()) == 1
    assert not re.search(r"aten\.(clone|copy|index_put)", re.sub(r"#.*", "", code))


def test_one_compile_for_every_number_of_tokens():
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled, first = None, 0
    # Sizes that meet no other: equal ones would be taken for one.
    for tokens in (4, 6, 8):
        case = operands("qwen3", tokens=tokens)
        before = case.copy()
        run, args = call(case)
        if compiled is None:
            compiled = torch.compile(run, backend=counter, dynamic=True)
        assert_agree(case, compiled(args), before)
        # The first call compiles twice: Dynamo starts anew when it meets a float argument.
        first = counter.frame_count if tokens == 4 else first
    assert counter.frame_count == first


def test_gradients_flow_through_the_compiled_op():
    case = operands("flux", batch=1, tokens=2, heads=2, kv_heads=1)
    run, args = call(case)
    leaves = [args[0].detach().requires_grad_(), args[2].detach().requires_grad_()]
    grads = []
    with torch.enable_grad():
        for function in (run, torch.compile(run)):
            q_out, k_out = function([leaves[0], args[1], leaves[1], *args[3:]])
            grads.append(torch.autograd.grad((q_out**2).sum() + k_out.sum(), leaves))
    for got, want in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_providers_say_who_took_a_call_and_why():
    facts = providers.Facts(SITES["qwen3"], (16, 8, 8), 1)
    pytest.importorskip("triton")
    assert providers.choose("cpu", facts).declined == (("triton", "not for cpu"),)
    record = SITES["qwen3"]
    bf16 = operands("qwen3", dtype=torch.bfloat16).record
    assert providers.choose("cuda", providers.Facts(bf16, (16, 8, 8), 1)).provider == "triton"
    symbolic = providers.choose("cuda", providers.Facts(record, (None, 8, 8), 1))
    assert symbolic == providers.Choice("loops", (("triton", "a head count is symbolic"),))
    wide = providers.choose("cuda", providers.Facts(record, (16, 8, 8), 2**16))
    assert wide.declined == (("triton", "a grid has at most 65535 batch rows"),)
    norm = dataclasses.replace(record.q.norm, kind="invented")
    other = dataclasses.replace(record, q=dataclasses.replace(record.q, norm=norm))
    declined = providers.choose("cuda", providers.Facts(other, (16, 8, 8), 1)).declined
    assert declined == (("triton", "the kernel knows the norm kinds rms, l2, layer only"),)


def test_the_kernel_declines_axes_that_it_cannot_paint():
    pytest.importorskip("triton")
    record = SITES["mrope"]
    q, k = record.q, record.k

    def by(axes):
        return dataclasses.replace(q, rotation=dataclasses.replace(q.rotation, axes=tuple(axes)))

    facts = providers.Facts(record, (16, 8, 8), 1)
    assert providers.choose("cuda", facts).provider == "triton"
    ragged = by([2, 1, 0, 0, 1, 2, 2, 1, 0, 1, 1, 2, 0, 0, 2, 1] * 4)
    facts = providers.Facts(dataclasses.replace(record, q=ragged, k=ragged), (16, 8, 8), 1)
    reason = "the axes of the pairs are more than 12 runs"
    assert providers.choose("cuda", facts).declined == (("triton", reason),)
    assert k is not None
    facts = providers.Facts(dataclasses.replace(record, q=by([1] * 16)), (16, 8, 8), 1)
    reason = "q and k turn by different axes"
    assert providers.choose("cuda", facts).declined == (("triton", reason),)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(SITES)),
    batch=st.integers(0, 3),
    tokens=st.integers(0, 5),
    heads=st.integers(1, 6),
    kv_heads=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_in_eager(name, batch, tokens, heads, kv_heads, dtype, seed):
    case = operands(name, batch, tokens, heads, kv_heads, dtype=dtype, seed=seed)
    before = case.copy()
    assert_agree(case, case.op()(*case.arguments()), before)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(SITES)),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 6),
    kv_heads=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape_compiled(name, tokens, heads, kv_heads, dtype):
    case = operands(name, 2, tokens, heads, kv_heads, dtype=dtype)
    before = case.copy()
    run, args = call(case)
    torch._dynamo.reset()
    assert_agree(case, torch.compile(run)(args), before)
