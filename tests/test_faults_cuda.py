"""Faults that only a GPU shows, each seen in another library's kernel: races, reads past a table,
replays, strides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxfuse
from tests.sites import LOOKED_UP, NORM, SITES, Operands, cached, halves, neighbours, operands, site
from tests.test_flat import Rotated, returned
from tests.test_head_sizes import GROUPS, HEAD_SIZES, Latent
from tests.test_kernels_cuda import assert_agree, compiled, fresh_dynamo, registered  # noqa: F401
from tests.test_kernels_interpreted import without_neighbours

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]
BF16 = torch.bfloat16


@pytest.mark.parametrize("rope", [halves, neighbours], ids=lambda f: f.__name__)
def test_a_turned_half_of_many_heads_is_the_same_six_times(
    rope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SITES, "half", site(128, rope(128, 64), norm=NORM))
    case = operands("half", 1, 4096, heads=64, kv_heads=8, dtype=BF16, device="cuda")
    before, run = case.copy(), compiled(case)
    results = run(list(case.arguments()))
    assert_agree(case, results, before)
    for _ in range(5):
        assert all(map(torch.equal, run(list(case.arguments())), results))


@pytest.mark.parametrize("rope", [halves, neighbours], ids=lambda f: f.__name__)
@pytest.mark.parametrize("channels", HEAD_SIZES)
def test_every_head_size(rope: Any, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = rope(channels, channels // 4 * 2)
    monkeypatch.setitem(SITES, "sized", site(channels, turn, norm=NORM, store=cached(True)))
    for heads, kv_heads in GROUPS:
        sizes = {"tokens": 7, "heads": heads, "kv_heads": kv_heads, "slots": 32}
        case = operands("sized", **sizes, dtype=BF16, device="cuda")
        before = case.copy()
        torch._dynamo.reset()
        assert_agree(case, compiled(case, dynamic=False)(list(case.arguments())), before)


@pytest.mark.parametrize("name", [*LOOKED_UP, "gptj, partial", "middle"])
def test_nothing_past_an_operand_is_read(name: str) -> None:
    """The last row of a table stands before NaN; so does each gap between heads."""
    case = without_neighbours(operands(name, tokens=5, slots=32, dtype=BF16, device="cuda"))
    before = case.copy()
    assert_agree(case, compiled(case)(list(case.arguments())), before)


def test_replays_of_a_cuda_graph_are_bitwise_equal() -> None:
    def drawn(seed: int) -> Operands:
        return operands("qwen3", tokens=3, slots=32, dtype=BF16, device="cuda", seed=seed)

    case = drawn(0)
    run, given = compiled(case), list(case.arguments())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        q_out = run(given)[0]
    seen: dict[int, list[torch.Tensor]] = {}
    for seed in (1, 2, 1):
        other = drawn(seed)
        for name, x in case.tensors.items():
            if x is not None:
                x.copy_(other.tensors[name])
        graph.replay()
        torch.cuda.synchronize()
        made = [x.clone() for x in (q_out, case.tensors["k_cache"], case.tensors["v_cache"])]
        wanted = run(list(other.arguments()))[0]
        assert torch.equal(made[0], wanted)
        assert torch.equal(made[1], other.tensors["k_cache"])
        assert all(map(torch.equal, made, seen.setdefault(seed, made)))


def test_q_and_k_whose_heads_lie_at_unlike_strides() -> None:
    q, k = (torch.randn(shape, device="cuda", dtype=BF16) for shape in ((70, 64, 256), (70, 1, 64)))
    angles = torch.randn(70, 32, device="cuda")
    got = torch.compile(Latent(), backend=fxfuse.backend)(q, k, angles)
    assert [f.stages for f in fxfuse.last_report().fused] == [("rope",)]
    want = Latent()(q.double(), k.double(), angles.double())
    for mine, truth in zip(got, want, strict=True):
        # The tables are float32, and so are products and results.
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


def test_two_devices_in_one_process() -> None:
    shapes = ((5, 4, 16), (5, 2, 16), (5, 2, 16))
    given = [*(torch.randn(shape) for shape in shapes), torch.arange(5)]
    want = Rotated(returned)(*given)
    for device in ("cuda", "cpu", "cuda"):
        run = torch.compile(Rotated(returned).to(device), backend=fxfuse.backend)
        for mine, eager in zip(run(*(x.to(device) for x in given)), want, strict=True):
            torch.testing.assert_close(mine.cpu(), eager, rtol=1e-5, atol=1e-5)
