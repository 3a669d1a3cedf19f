"""QKV split, QK-norm, 3-axis mRoPE and the write into a paged 8-bit KV cache.

    python examples/mrope_paged_fp8.py [--device cpu|cuda] [--tokens N] [--dtype D]

As a serving engine's native path writes a layer of a vision-language model (Qwen3-VL): a token has
three positions (time, height, width), every third pair of channels turns by each, and rows go to
shuffled pages of float8_e4m3fn, [blocks, G, D / x, page, x] for keys and
[blocks, G, page / x, D, x] for values, divided by a scale.
"""

from __future__ import annotations

import torch
from showing import Chain, main
from torch import Tensor, nn

H, G, D = 16, 2, 128
SECTION = (24, 20, 20)
PAGE, X, P = 16, 16, 8192
FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, D))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


def interleaved(table: Tensor) -> Tensor:
    """[T, D / 2] of [3, T, D / 2]: T H W T H W ... T T."""
    mixed = table[0].clone()
    for axis in (1, 2):
        mixed[..., axis : 3 * SECTION[axis] : 3] = table[axis, ..., axis : 3 * SECTION[axis] : 3]
    return mixed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)


def quantised(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8).view(torch.uint8)


class Prelude(nn.Module):
    """q [T, H, D] as attention reads it; k and v go to their pages."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = RMSNorm(), RMSNorm()
        frequency = 1e6 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
        angle = torch.arange(P)[:, None] * frequency
        self.register_buffer("table", torch.cat((angle.cos(), angle.sin()), -1).float())

    def forward(
        self, qkv: Tensor, positions: Tensor, slots: Tensor, k_scale: Tensor, v_scale: Tensor,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        q, k, v = qkv.unflatten(-1, (-1, D)).split((H, G, G), dim=-2)
        cos, sin = self.table[positions].chunk(2, dim=-1)
        cos, sin = (interleaved(x).unsqueeze(-2) for x in (cos, sin))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        block, place = slots // PAGE, slots % PAGE
        k_cache[block, :, :, place] = quantised(k, k_scale).unflatten(-1, (-1, X))
        v_cache[block, :, place // X, :, place % X] = quantised(v, v_scale)
        return q


def inputs(device: str, dtype: torch.dtype, tokens: int) -> tuple[Tensor, ...]:
    """A packed projection [T, (H + 2 G) D], positions [3, T] that differ, slots in no order."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-2 * tokens // PAGE)
    qkv = torch.randn(tokens, (H + 2 * G) * D, generator=generator).to(dtype)
    positions = torch.randint(P, (3, tokens), generator=generator)
    slots = torch.randperm(blocks * PAGE, generator=generator)[:tokens]
    scales = [torch.tensor([s]) for s in (0.02, 0.01)]
    caches = [
        torch.randint(100, shape, generator=generator, dtype=torch.uint8)
        for shape in ((blocks, G, D // X, PAGE, X), (blocks, G, PAGE // X, D, X))
    ]
    return tuple(x.to(device) for x in (qkv, positions, slots, *scales, *caches))


CHAIN = Chain("mRoPE and 8-bit pages", Prelude(), inputs, written=(5, 6))

if __name__ == "__main__":
    raise SystemExit(main(CHAIN))
