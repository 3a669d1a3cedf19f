"""Sizes of heads, of their rotated part and of the groups of q and k: fused, and eager's result.

In: toys and records of each size. Out: their results, and kernels that compile.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.sites import NORM, SITES, cached, halves, neighbours, operands, site
from tests.spellings import Rope, cohere, llama, narrow, pairs
from tests.toys import Layer, Sizes, assert_like, compiled_like_eager, hidden_states

HEAD_SIZES = (40, 48, 80, 96, 112, 120, 192, 256, 512)
# q heads, k heads: one for all, as many, not a multiple, more of k than of q.
GROUPS = [(4, 1), (5, 5), (6, 4), (2, 3)]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def q_and_k(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


@pytest.mark.null
@pytest.mark.parametrize("channels", HEAD_SIZES)
@pytest.mark.parametrize("rope", [Rope(llama), Rope(cohere, pairs)], ids=str)
def test_every_head_size_fuses(rope: Rope, channels: int) -> None:
    for rotary in (channels, channels // 4 * 2):
        toy = Layer(q_and_k, rope=rope, sizes=Sizes(2, 1, channels, rotary))
        (fused,) = compiled_like_eager(toy, hidden_states(3)).fused
        assert fused.record.q.channels == channels
        assert 2 * fused.record.q.rotation.pairs == rotary


@pytest.mark.null
@pytest.mark.parametrize("rotary", [2, 4, 14, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_every_group_and_every_rotary_width_fuse(heads: int, kv_heads: int, rotary: int) -> None:
    toy = Layer(q_and_k, sizes=Sizes(heads, kv_heads, 16, rotary))
    (fused,) = compiled_like_eager(toy, hidden_states(3)).fused
    assert 2 * fused.record.q.rotation.pairs == rotary


class Latent(nn.Module):
    """MLA: q [T, H, 64] is the tail of heads of 256 channels, k [T, 1, 64] stands alone."""

    def forward(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (t.unsqueeze(1) for t in narrow(angles))
        first, second = q[..., 192:].unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
        one, two = k.unflatten(-1, (-1, 2)).unbind(-1)
        other = torch.stack((one * cos - two * sin, two * cos + one * sin), -1)
        return turned.flatten(-2), other.flatten(-2)


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)
def test_q_and_k_whose_heads_lie_at_unlike_strides(compiler: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, angles = (
        torch.randn(shape, generator=generator) for shape in ((7, 64, 256), (7, 1, 64), (7, 32))
    )
    with torch.no_grad():
        run = torch.compile(Latent(), backend=fxfuse.Backend(compiler=compiler))
        assert_like(run(q, k, angles), Latent()(q, k, angles))
    assert [f.stages for f in fxfuse.last_report().fused] == [("rope",)]


@pytest.mark.aot
@pytest.mark.parametrize("channels", HEAD_SIZES)
@pytest.mark.parametrize("rope", [halves, neighbours], ids=lambda f: f.__name__)
def test_a_kernel_compiles_for_every_head_size(
    rope: Any, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from tests.test_kernels_aot import planned, source

    rotary = channels // 4 * 2
    record = site(channels, rope(channels, rotary), norm=NORM, store=cached(True))
    monkeypatch.setitem(SITES, "sized", dataclasses.replace(record))
    case = operands("sized", heads=6, kv_heads=4, tokens=32, slots=64, dtype=torch.bfloat16)
    plan = planned(case)
    options = {"num_warps": plan.warps, "num_stages": 1, "enable_fp_fusion": True}
    compiled = triton.compile(source(plan), target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["ptx"]
