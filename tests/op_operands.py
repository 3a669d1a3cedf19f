"""Operands of the ops and the parts of their formulas, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fxfuse.ops
from fxfuse.patterns.record import Record, Stream
from tests import sites

B, T, H, G, D, S = 2, 5, 4, 2, 16, 11


def stream(rope: sites.Rope | None = None, **fields: Any) -> Stream:
    return sites.stream(D, rope, **fields)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def angles(width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angle = draw(1, T, width, seed=7)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rms(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def call(
    record: Record, q, k=None, q_w=None, k_w=None, q_b=None, q_s=None, cos=None, sin=None, eps=1e-6
):
    return fxfuse.ops.norm_rope(
        q, k, q_w, k_w, q_b, None, q_s, None, cos, sin, None, eps, 1e-5, record.to_text()
    )
