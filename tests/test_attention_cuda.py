"""Attention with one query row on a GPU: exact, the same bits in every run, beside other work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fxfuse
from fxfuse.lowering import attention_launch, direct, providers
from fxfuse.lowering.attention_launch import Block
from tests.decode_sites import SHAPES, Shape, arguments, tensors, truth
from tests.test_projection_cuda import model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]

LARGE = {
    "0.6B": Shape(16, 8, 128, 1024),
    "8B, 4096": Shape(32, 8, 128, 4096, "window"),
    "gemma": Shape(16, 8, 256, 4000, "window", is_boolean=False),
    "gpt-oss": Shape(64, 8, 64, 2048, "holes"),
    "0.6B, 16 rows": Shape(16, 8, 128, 1024, "padded", batch=16),
    "by head": Shape(32, 8, 96, 777, "heads", batch=2),
    "one head of k": Shape(8, 1, 80, 3000, "", slots_first=True),
    "many rows": Shape(4, 2, 128, 300, "padded", batch=40),
}
EVERY = SHAPES | LARGE
BLOCKS = [None, Block(32, 4, 1, 1), Block(16, 2, 3, 8), Block(16, 4, 2, 4, cores=False)]


def torchs(given: dict[str, Tensor]) -> Tensor:
    """torch's attention, with k and v repeated: its kernels take no other heads with a mask."""
    times = given["q"].shape[1] // given["k"].shape[1]
    k, v = (given[name].repeat_interleave(times, 1) for name in "kv")
    return F.scaled_dot_product_attention(given["q"], k, v, given.get("mask"))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-9))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("block", BLOCKS, ids=["table", "alone", "split", "sums"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
    ids=["fp32", "bf16", "fp16"],
)
def test_results_against_float64(
    name: str, block: Block | None, dtype: torch.dtype, bound: float
) -> None:
    given = tensors(EVERY[name], dtype, "cuda")
    plan, out, counters = attention_launch.on_tensors(given, None, block)
    for memory in (out, plan.arguments["parts_ptr"], plan.arguments["stats_ptr"]):
        memory.fill_(float("nan"))
    direct.prepared(plan)()
    assert not counters.any()
    assert error(out, truth(given)) < bound


@pytest.mark.parametrize("name", LARGE)
def test_no_worse_than_torchs(name: str) -> None:
    given = tensors(LARGE[name], torch.bfloat16, "cuda")
    want = truth(given)
    got = torch.ops.fxfuse.decode_attention(*arguments(given))
    assert error(got, want) <= 1.05 * error(torchs(given), want)


@pytest.mark.parametrize("is_boolean", [True, False])
def test_a_row_that_attends_nothing_is_that_of_torchs_definition(is_boolean: bool) -> None:
    """torch's fused kernels disagree: one of them gives the mean of v where the mask is boolean."""
    given = tensors(Shape(4, 2, 64, 256, "nothing", is_boolean), torch.bfloat16, "cuda")
    got = torch.ops.fxfuse.decode_attention(*arguments(given))
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torchs(given)
    assert torch.equal(got, torch.zeros_like(got)) and torch.equal(got, wanted)


def test_what_is_not_attended_is_not_read() -> None:
    given = tensors(LARGE["8B, 4096"], torch.bfloat16, "cuda")
    want = truth(given)
    used = given["mask"].flatten(0, 2).any(0).nonzero()
    for name in "kv":
        given[name][:, :, : int(used[0])] = float("nan")
        given[name][:, :, int(used[-1]) + 1 :] = float("nan")
    assert error(torch.ops.fxfuse.decode_attention(*arguments(given)), want) < 4e-3


@pytest.mark.parametrize("name", ["0.6B", "gemma", "0.6B, 16 rows", "by head", "many rows"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_through_inductor(name: str, mode: str) -> None:
    torch._dynamo.reset()
    providers.register()
    providers.chosen.clear()
    given = tensors(LARGE[name], torch.bfloat16, "cuda")
    args = arguments(given)
    compiled = torch.compile(
        lambda *x: torch.ops.fxfuse.decode_attention(*x, *args[4:]), fullgraph=True, mode=mode
    )
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        for _ in range(3):
            got = compiled(*args[:4]).clone()
    assert [c.provider for c in providers.chosen] == ["triton"]
    assert torch.equal(got, torch.ops.fxfuse.decode_attention(*args))


def test_the_same_bits_in_every_replay_beside_other_work() -> None:
    given = tensors(LARGE["8B, 4096"], torch.bfloat16, "cuda")
    given["mask"] = torch.ones_like(given["mask"])
    plan, out, counters = attention_launch.on_tensors(given, None)
    assert plan.constants["SPLITS"] > 1
    launch = direct.prepared(plan)
    launch()
    torch.cuda.synchronize()
    first = out.clone()
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
        assert torch.equal(out, first)
    assert not counters.any()


def test_a_replay_reads_the_mask_as_it_is_then() -> None:
    """As a cache fills, the same graph shares its slots out anew."""
    given = tensors(LARGE["0.6B"], torch.bfloat16, "cuda")
    plan, out, counters = attention_launch.on_tensors(given, None)
    launch = direct.prepared(plan)
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    slots = torch.arange(1024, device="cuda")
    for filled in (1, 40, 64, 65, 500, 1024, 0, 3):
        given["mask"].copy_((slots < filled)[None, None, None])
        graph.replay()
        torch.cuda.synchronize()
        assert error(out, truth(given)) < 4e-3 and not counters.any()


def test_two_streams_have_counters_of_their_own() -> None:
    given = [tensors(LARGE["0.6B"], torch.bfloat16, "cuda", seed=i) for i in range(2)]
    plans = [attention_launch.on_tensors(one, None) for one in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, (plan, *_) in zip(streams, plans, strict=True):
            with torch.cuda.stream(stream):
                direct.prepared(plan)()
    torch.cuda.synchronize()
    for one, (_, out, counters) in zip(given, plans, strict=True):
        assert not counters.any() and error(out, truth(one)) < 4e-3


def test_greedy_tokens_are_eagers() -> None:
    torch._dynamo.reset()
    net = model(torch.float32)
    ids = torch.arange(3, 19, device="cuda")[None]
    how = {"max_new_tokens": 128, "do_sample": False, "cache_implementation": "static"}
    want = net.generate(ids, disable_compile=True, **how)
    net.forward = torch.compile(
        net.forward, backend=fxfuse.Backend(gate="always", strict=True), dynamic=False
    )
    got = net.generate(ids, disable_compile=True, **how)
    report = fxfuse.last_report()
    assert report is not None
    made = [f for f in report.fused if f.kind == "decode_attention"]
    assert len(made) == 4 and {f.provider for f in made} == {"triton"}
    assert torch.equal(got, want)


@torch.no_grad()
def test_two_graphs_of_two_models_in_cuda_graphs() -> None:
    """Each has counters of its own; steps alternate, and the logits stay each model's."""
    from transformers import StaticCache

    nets = [model(torch.bfloat16), model(torch.bfloat16)]
    prompt = torch.arange(3, 19, device="cuda")[None]
    steps, held, wanted = [], [], []
    for i, net in enumerate(nets):
        for weight in net.parameters():
            weight.mul_(1 + 0.1 * i)
        eager, ours = (StaticCache(config=net.config, max_cache_len=300) for _ in range(2))
        for cache in (eager, ours):
            net(prompt, past_key_values=cache)
        held.append(ours)
        tokens = [torch.tensor([[token]], device="cuda") for token in range(4)]
        wanted.append([net(t, past_key_values=eager).logits.clone() for t in tokens])
        backend = fxfuse.Backend(gate="always", disable=("projection",))
        steps.append(torch.compile(net, backend=backend, dynamic=False, mode="reduce-overhead"))
    for token in range(4):
        for step, cache, want in zip(steps, held, wanted, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            ids = torch.tensor([[token]], device="cuda")
            got = step(ids, past_key_values=cache).logits.clone().double()
            assert float((got - want[token]).norm() / want[token].double().norm()) < 2e-2
