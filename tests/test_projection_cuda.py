"""The projection's kernel on a GPU: exact, the same bits in every run, beside other work."""

from __future__ import annotations

import pytest
import torch

import fxfuse
from fxfuse.lowering import direct, providers
from tests.projected_sites import (
    BEHIND_NORMS,
    GEMMA,
    SHAPES,
    WIDE,
    Shape,
    arguments,
    errors,
    planned,
    tensors,
    truth,
)
from tests.sites import NORM, cached, site, with_dtype

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]

LARGE = {
    "0.6B": Shape(16, 8, 128, 1024, WIDE),
    "8B": Shape(32, 8, 128, 4096, WIDE),
    "gpt-oss": Shape(64, 8, 64, 2880, site(64, store=cached(True)), bias=True),
    "gemma": Shape(16, 8, 256, 3840, site(256, norm=NORM, store=cached(True))),
    "qwen2.5": Shape(28, 4, 128, 3584, site(128, store=cached(True)), bias=True),
    "0.6B, 16 rows": Shape(16, 8, 128, 1024, WIDE, batch=16),
    "8B, 5 tokens": Shape(32, 8, 128, 4096, WIDE, tokens=5),
}
LARGE |= {
    "0.6B, normed": LARGE["0.6B"].behind(NORM),
    "8B, normed": LARGE["8B"].behind(NORM),
    "gpt-oss, normed": LARGE["gpt-oss"].behind(NORM),
    "gemma, normed": LARGE["gemma"].behind(GEMMA),
}
EVERY = SHAPES | LARGE


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
    ids=["fp32", "bf16", "fp16"],
)
def test_results_and_caches_against_float64(name: str, dtype: torch.dtype, bound: float) -> None:
    found = errors(EVERY[name], dtype, lambda plan: direct.prepared(plan)(), "cuda")
    assert max(found) < bound, found


def compiled_op(shape: Shape, record: str):
    """The op through Inductor and the Triton kernel."""
    op = torch.ops.fxfuse.project_norm_rope_store_

    def call(*args):
        return op(*args, 1e-6, 1e-6, record)

    return torch.compile(call, fullgraph=True)


THROUGH_INDUCTOR = ("0.6B", "0.6B, 16 rows", "gpt-oss", "gptj, packed", "phi, 2 x 3")


@pytest.mark.parametrize("name", [*THROUGH_INDUCTOR, *BEHIND_NORMS, "0.6B, normed"])
def test_through_inductor(name: str) -> None:
    torch._dynamo.reset()
    providers.register()
    providers.chosen.clear()
    shape = EVERY[name]
    given = tensors(shape, torch.bfloat16, "cuda")
    want = truth(shape, given)
    eager = {n: x.clone() for n, x in given.items()}
    text = (
        with_dtype(shape.record, "bfloat16")
        .to_text()
        .replace('"projected":false', '"projected":true')
    )
    with torch.no_grad():
        op = torch.ops.fxfuse.project_norm_rope_store_
        plain = op(*arguments(eager), 1e-6, 1e-6, text)
        with torch._inductor.config.patch(force_disable_caches=True):
            got = compiled_op(shape, text)(*arguments(given))
    assert [c.provider for c in providers.chosen] == ["triton"]
    kept = [r for r in got if r.numel()]
    plain_kept = [r for r in plain if r.numel()]
    for ours, theirs, exact in zip(
        (*kept, given["k_cache"], given["v_cache"]),
        (*plain_kept, eager["k_cache"], eager["v_cache"]),
        want,
        strict=True,
    ):
        error, eagers = (float((x.double() - exact).norm()) for x in (ours, theirs))
        assert error <= 1.05 * eagers


@pytest.mark.parametrize("name", ["8B", "8B, normed", "8B, 5 tokens"])
def test_the_same_bits_in_every_replay_beside_other_work(name: str) -> None:
    shape = LARGE[name]
    given = tensors(shape, torch.bfloat16, "cuda")
    plan, results, counters = planned(shape, given)
    launch = direct.prepared(plan)
    launch()
    torch.cuda.synchronize()
    first = [x.clone() for x in (*results, given["k_cache"], given["v_cache"])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            launch()
    other = torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(100):
        with torch.cuda.stream(other):
            torch.mm(a, a)
        graph.replay()
        torch.cuda.synchronize()
        now = (*results, given["k_cache"], given["v_cache"])
        assert all(torch.equal(x, y) for x, y in zip(now, first, strict=True))
    assert not counters.any()


def test_two_streams_have_counters_of_their_own() -> None:
    shape = LARGE["0.6B"]
    given = [tensors(shape, torch.bfloat16, "cuda", seed=i) for i in range(2)]
    wanted = [truth(shape, one) for one in given]
    plans = [planned(shape, one) for one in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, (plan, *_) in zip(streams, plans, strict=True):
            with torch.cuda.stream(stream):
                direct.prepared(plan)()
    torch.cuda.synchronize()
    for one, want, (_, results, counters) in zip(given, wanted, plans, strict=True):
        assert not counters.any()
        for got, exact in zip((*results, one["k_cache"], one["v_cache"]), want, strict=True):
            assert float((got.double() - exact).norm() / exact.norm()) < 4e-3


def model(dtype: torch.dtype):
    """Four layers of a Qwen3 with grouped heads."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to("cuda", dtype).eval()


def test_greedy_tokens_are_eagers() -> None:
    torch._dynamo.reset()
    net = model(torch.float32)
    ids = torch.arange(3, 19, device="cuda")[None]
    how = {"max_new_tokens": 128, "do_sample": False, "cache_implementation": "static"}
    want = net.generate(ids, disable_compile=True, **how)
    compiled = torch.compile(
        net.forward, backend=fxfuse.Backend(gate="always", strict=True), dynamic=False
    )
    net.forward = compiled
    got = net.generate(ids, disable_compile=True, **how)
    report = fxfuse.last_report()
    assert report is not None
    made = [f for f in report.fused if "projection" in f.stages]
    assert len(made) == 4 and {f.provider for f in made} == {"triton"}
    # Of the first layer, whose norm is the embedding's, x is no sum.
    assert sum("add" in f.stages for f in made) == 3
    assert torch.equal(got, want)


@torch.no_grad()
def test_a_step_in_cuda_graphs_projects_each_layer_and_takes_no_more_memory() -> None:
    from transformers import StaticCache

    net = model(torch.bfloat16)
    peaks, logits = {}, {}
    for backend in ("inductor", fxfuse.Backend(strict=True)):
        torch._dynamo.reset()
        cache = StaticCache(config=net.config, max_cache_len=64)
        step = torch.compile(net, backend=backend, dynamic=False, mode="reduce-overhead")
        net(torch.arange(3, 19, device="cuda")[None], past_key_values=cache)
        torch.cuda.reset_peak_memory_stats()
        for token in range(4):
            out = step(torch.tensor([[token]], device="cuda"), past_key_values=cache).logits.clone()
        torch.cuda.synchronize()
        peaks[str(backend)] = torch.cuda.max_memory_allocated()
        logits[str(backend)] = out
    stock, ours = peaks.values()
    report = fxfuse.last_report()
    assert report is not None
    assert sum("projection" in f.stages for f in report.fused) == 4
    assert sum("add" in f.stages for f in report.fused) == 3
    # Inductor's own allocation may differ by a block.
    assert ours <= 1.02 * stock
    a, b = (x.double() for x in logits.values())
    assert float((a - b).norm() / a.norm()) < 2e-2
