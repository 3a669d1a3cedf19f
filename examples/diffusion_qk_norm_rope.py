"""QK-norm and RoPE of a diffusion transformer: text and image segments in one attention.

    python examples/diffusion_qk_norm_rope.py [--device cpu|cuda] [--tokens N] [--dtype D]

As double-stream blocks write it (Qwen-Image, Flux): each segment has projections and norm weights
of its own, and its own positions in one table [P, cos | sin]; adjacent channels turn together; q
and k of both segments are joined for attention.

    y[2i]     = n[2i] cos[p, i] - n[2i + 1] sin[p, i]         n = x / rms(x) * w
    y[2i + 1] = n[2i + 1] cos[p, i] + n[2i] sin[p, i]
"""

from __future__ import annotations

import torch
from showing import Chain, main
from torch import Tensor, nn

H, D, P = 24, 128, 8192
TEXT = 64


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] by cos and sin [B, T, 1, D / 2], in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x)


class Segment(nn.Module):
    """QK-norm and RoPE of one segment, text or image."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.q_weight, self.k_weight = (nn.Parameter(1 + 0.2 * torch.randn(D)) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.table[positions].unsqueeze(-2).chunk(2, dim=-1)
        q, k = rms_norm(q, self.q_weight), rms_norm(k, self.k_weight)
        return rotate(q, cos, sin), rotate(k, cos, sin)


class Joined(nn.Module):
    """q, k, v [B, text + image, H, D] as attention reads them."""

    def __init__(self) -> None:
        super().__init__()
        frequency = 1e4 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
        angle = torch.arange(P)[:, None] * frequency
        table = torch.cat((angle.cos(), angle.sin()), -1).float()
        self.text, self.image = Segment(table), Segment(table)

    def forward(
        self, text: Tensor, image: Tensor, text_positions: Tensor, image_positions: Tensor
    ) -> tuple[Tensor, ...]:
        tq, tk, tv = text.unflatten(-1, (3 * H, D)).chunk(3, dim=-2)
        iq, ik, iv = image.unflatten(-1, (3 * H, D)).chunk(3, dim=-2)
        tq, tk = self.text(tq, tk, text_positions)
        iq, ik = self.image(iq, ik, image_positions)
        return torch.cat((tq, iq), 1), torch.cat((tk, ik), 1), torch.cat((tv, iv), 1)


def inputs(device: str, dtype: torch.dtype, tokens: int) -> tuple[Tensor, ...]:
    """Packed projections [1, T, 3 H D] of both segments; the image's positions are random, the
    text's follow the largest of them.
    """
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(1, t, 3 * H * D, generator=generator) for t in (TEXT, tokens))
    image_positions = torch.randint(P - TEXT, (1, tokens), generator=generator)
    text_positions = P - TEXT + torch.arange(TEXT)[None]
    given = (text.to(dtype), image.to(dtype), text_positions, image_positions)
    return tuple(x.to(device) for x in given)


torch.manual_seed(0)
CHAIN = Chain("diffusion QK-norm + RoPE", Joined(), inputs)

if __name__ == "__main__":
    raise SystemExit(main(CHAIN))
