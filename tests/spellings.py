"""Spellings of the rotation, its tables and RMSNorm, as real models write them.

In: nothing. Out: `Rope` entries, in groups that must give one record, and norms of
(x, weight, eps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, cos, sin -> rotated x

# --- tables: angles [1, T, R / 2] -> cos and sin -----------------------------------------------


def halves(angles: Tensor) -> tuple[Tensor, Tensor]:
    """[1, T, R], channel i and i + R / 2 turn together (llama)."""
    both = torch.cat([angles, angles], -1)
    return both.cos(), both.sin()


def pairs(angles: Tensor) -> tuple[Tensor, Tensor]:
    """[1, T, R], channels 2 i and 2 i + 1 turn together (cohere)."""
    both = torch.repeat_interleave(angles, 2, dim=-1)
    return both.cos(), both.sin()


def narrow(angles: Tensor) -> tuple[Tensor, Tensor]:
    """[1, T, R / 2], one entry a pair (gpt-oss)."""
    return angles.cos(), angles.sin()


def unit_circle(angles: Tensor) -> tuple[Tensor, Tensor]:
    """[1, T, R / 2] complex, given twice (llama4)."""
    circle = torch.polar(torch.ones_like(angles), angles)
    return circle, circle


# --- rope spellings: half pairs ----------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (rotate_half(x) * sin)


def chunked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def splitted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = torch.split(x, x.shape[-1] // 2, dim=-1)
    return torch.add(torch.mul(x, cos), torch.concat([second.neg(), first], -1) * sin)


def narrowed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([x.narrow(-1, half, half) * -1, x.narrow(-1, 0, half)], -1)
    return turned * sin + x * cos


def unbound(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (2, x.shape[-1] // 2)).unbind(-2)
    return x * cos + torch.stack((-second, first), dim=-2).flatten(-2) * sin


def by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = torch.chunk(x, 2, dim=-1)
    (c0, c1), (s0, s1) = cos.chunk(2, -1), sin.chunk(2, -1)
    return torch.cat([first * c0 - second * s0, second * c1 + first * s1], dim=-1)


def rolled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.roll(torch.cat([first, -second], -1), x.shape[-1] // 2, -1)
    return x * cos + turned * sin


def flipped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    swapped = torch.stack([first, -second], -2).flip(-2).flatten(-2)
    return x * cos + swapped * sin


def addcmul(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, rotate_half(x), sin)


def subtracted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos - torch.cat([x[..., half:], -x[..., :half]], -1) * sin


def padded(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half], x[..., :0]], -1) * sin


def in_float(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Upcast, turned, cast back (ernie, qwen2-vl vision)."""
    y = x.float()
    return ((y * cos.float()) + (rotate_half(y) * sin.float())).to(x.dtype)


def contiguous_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half].contiguous(), x[..., half:].clone()
    return x.clone() * cos + torch.cat([-second, first], -1).contiguous() * sin


def gpt_oss(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gpt_oss_addcmul(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = torch.chunk(x, 2, dim=-1)
    low = torch.addcmul(first * cos, second, sin, value=-1)
    return torch.cat((low, torch.addcmul(second * cos, first, sin)), dim=-1)


def nanochat(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the other way."""
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


# --- rope spellings: adjacent pairs ------------------------------------------------------------


def cohere(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def glm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The table's first half, each entry twice."""
    cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
    sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)
    return cohere(x, cos, sin)


def gptj(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.repeat_interleave(t, 2, t.dim() - 1) for t in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos) + (turned * sin)


def even_and_odd(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def even_and_odd_unflattened(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.reshape(x.shape)


def deepseek(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Adjacent pairs in, half pairs out."""
    x = x.unflatten(-1, (x.shape[-1] // 2, 2)).transpose(-1, -2).flatten(-2)
    return llama(x, cos, sin)


def llama4(x: Tensor, circle: Tensor, _: Tensor) -> Tensor:
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * circle).flatten(3).type_as(x)


@dataclass(frozen=True)
class Rope:
    """A spelling of the rotation, and the tables it wants."""

    turn: Turn
    table: Callable[[Tensor], tuple[Tensor, Tensor]] = halves

    def __str__(self) -> str:
        return f"{self.turn.__name__}-{self.table.__name__}"


_HALF = (llama, chunked, splitted, narrowed, unbound, by_halves, rolled, flipped, addcmul)
HALF_FULL = [Rope(turn) for turn in (*_HALF, subtracted, padded, in_float, contiguous_parts)]
HALF_NARROW = [Rope(gpt_oss, narrow), Rope(gpt_oss_addcmul, narrow)]
ADJACENT_FULL = [Rope(cohere, pairs)]
ADJACENT_NARROW = [
    Rope(gptj, narrow),
    Rope(glm, halves),
    Rope(even_and_odd, narrow),
    Rope(even_and_odd_unflattened, narrow),
]
OTHER = [Rope(nanochat, narrow), Rope(deepseek), Rope(llama4, unit_circle)]
ROPES = [*HALF_FULL, *HALF_NARROW, *ADJACENT_FULL, *ADJACENT_NARROW, *OTHER]

# --- norm spellings ----------------------------------------------------------------------------

Normed = Callable[[Tensor, Tensor, float], Tensor]  # x, weight, eps -> y


def rsqrt(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def power(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5) * weight


def times_itself(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True).add(eps))) * weight


def square(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(eps + x.square().mean(-1, True)) * x * weight


def divided(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def inverted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * (1 / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())


def summed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return weight * (x * (mean + eps).pow(0.5).pow(-1))


def functional(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def squeezed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1) + eps).unsqueeze(-1) * weight[None, None, None]


def gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.float())).type_as(x)


def weightless(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


NORMS: list[Normed] = [rsqrt, power, times_itself, square, divided, inverted, functional, squeezed]
NORMS += [summed]

# --- the length of a row: clamped from below, or with eps in its root --------------------------


def zaya(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.shape[-1] ** 0.5 / x.norm(p=2, dim=-1, keepdim=True).clamp_min(eps)) * weight


def clamped_length(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps) * weight


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.normalize(x, dim=-1, eps=eps) * weight


def clamped_root(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / x.pow(2).sum(-1).sqrt().clamp_min(eps).unsqueeze(-1) * weight


def clamped_squares(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * x.square().sum(-1, keepdim=True).clamp_min(eps**2).rsqrt() * weight


def length(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """qwen3-next's l2norm: an RMSNorm of another size."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + eps) * weight


L2_NORMS: list[Normed] = [zaya, clamped_length, normalized, clamped_root, clamped_squares]

# --- layer norms -------------------------------------------------------------------------------


def cohere_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return weight.float() * ((x - mean) * torch.rsqrt(variance + eps))


def layer(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, None, eps)


def centred_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1).unsqueeze(-1)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def minus_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rsqrt(-x.mean(-1, True) + x, weight, eps)


def layer_and_bias(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, weight / 2, eps)


def chameleon(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.reshape(-1, *x.shape[-2:])
    rows = F.layer_norm(rows, rows.shape[-1:], None, None, eps) * weight + weight / 2
    return rows.reshape(x.shape)


LAYER_NORMS: list[Normed] = [cohere_norm, layer, centred_first, minus_first]
