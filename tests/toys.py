"""Toy attention modules: one statement in the spellings of real models.

In: a rope spelling, a norm spelling, a way to pack q, k and v, and sizes. Out: a module from hidden
states to attention's result, `projection -> [norm] -> rope -> [norm] -> [store] -> sdpa`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse

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

# --- the module --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary: int = 16
    hidden: int = 32


class Attention(nn.Module):
    """One attention layer; `between` sees q and k between the rotation and store or attention."""

    def __init__(
        self,
        rope: Rope = Rope(llama),
        norm: Normed | None = None,
        *,
        after: bool = False,
        wide: bool = False,
        eps: tuple[float, float] = (1e-6, 1e-6),
        packing: str = "separate",
        partial: str = "inside",
        tokens_first: bool = False,
        between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        sizes: Sizes = Sizes(),
    ) -> None:
        super().__init__()
        self.rope, self.norm, self.after, self.wide, self.eps = rope, norm, after, wide, eps
        self.packing, self.partial, self.tokens_first = packing, partial, tokens_first
        self.between, self.sizes = between, sizes
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            noise = torch.randn(shape, generator=generator)
            scale = 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.2
            return nn.Parameter(noise * scale + (len(shape) == 1))

        d, hidden = sizes.head_dim, sizes.hidden
        self.counts = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        self.project = nn.Linear(hidden, sum(self.counts) * d, bias=False)
        self.project.weight = weight(sum(self.counts) * d, hidden)
        self.q_weight = weight(sizes.heads * d if wide else d)
        self.k_weight = weight(sizes.kv_heads * d if wide else d)
        frequencies = 10000.0 ** -(torch.arange(0, sizes.rotary, 2) / sizes.rotary)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.eval()

    def forward(
        self,
        x: Tensor,
        caches: tuple[Tensor, Tensor] | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.split(x)
        cos, sin = self.tables(torch.arange(x.shape[1]) if slots is None else slots)
        q, k = self.prelude(q, k, cos, sin)
        if caches is not None:
            assert slots is not None
            caches[0].index_copy_(2, slots, k)
            caches[1].index_copy_(2, slots, v)
            k, v = caches
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def prelude(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, T, D] before and after; tables are [1, T, R]."""
        if self.tokens_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = (t.unsqueeze(2 if self.tokens_first else 1) for t in (cos, sin))
        if self.norm is not None and not self.after and not self.wide:
            q, k = (
                self.norm(q, self.q_weight, self.eps[0]),
                self.norm(k, self.k_weight, self.eps[1]),
            )
        q, k = self.rotate(q, k, cos, sin)
        if self.norm is not None and self.after:
            q, k = (
                self.norm(q, self.q_weight, self.eps[0]),
                self.norm(k, self.k_weight, self.eps[1]),
            )
        if self.between is not None:
            q, k = self.between(q, k)
        return (q.transpose(1, 2), k.transpose(1, 2)) if self.tokens_first else (q, k)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        width, turn = self.sizes.rotary, self.rope.turn
        if width == self.sizes.head_dim and self.partial != "empty":
            return turn(q, cos, sin), turn(k, cos, sin)
        if self.partial == "outside":
            (q, q_rest), (k, k_rest) = (
                t.split([width, self.sizes.head_dim - width], -1) for t in (q, k)
            )
            q, k = turn(q, cos, sin), turn(k, cos, sin)
            return torch.cat([q, q_rest], -1), torch.cat([k, k_rest], -1)

        def inside(x: Tensor) -> Tensor:
            return torch.cat((turn(x[..., :width], cos, sin), x[..., width:]), dim=-1)

        return inside(q), inside(k)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.rope.table(positions[None, :, None].float() * self.inv_freq)

    def split(self, x: Tensor) -> list[Tensor]:
        """q, k and v as [B, H, T, D]."""
        d, counts = self.sizes.head_dim, self.counts
        y = self.project(x)
        if self.packing == "by head":  # gpt-neox: q, k, v inside each head
            y = y.view(*x.shape[:2], -1, 3 * d).transpose(1, 2)
            return list(y.chunk(3, dim=-1))
        if self.packing == "one view":
            y = y.view(*x.shape[:2], sum(counts), d).transpose(1, 2)
            return list(y.split(counts, dim=1))
        if self.packing == "slices":  # phi3
            cuts = (0, counts[0] * d, (counts[0] + counts[1]) * d, sum(counts) * d)
            parts = [y[..., a:b] for a, b in pairwise(cuts)]
        else:
            weights = self.project.weight.split([n * d for n in counts])
            parts = [F.linear(x, w) for w in weights]
        if self.wide and self.norm is not None:  # olmo2
            parts[0] = self.norm(parts[0], self.q_weight, self.eps[0])
            parts[1] = self.norm(parts[1], self.k_weight, self.eps[1])
        return [
            t.view(*x.shape[:2], n, d).transpose(1, 2) for t, n in zip(parts, counts, strict=True)
        ]


# --- how the tests drive them ------------------------------------------------------------------


def hidden_states(tokens: int = 5, batch: int = 2, width: int = 32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, width, generator=generator)


@torch.no_grad()
def explain(toy: Any, *args: Any) -> fxfuse.Report:
    return fxfuse.explain(toy, *args, compiler="eager")


@torch.no_grad()
def compiled_like_eager(toy: Any, *args: Any, tolerance: float = 1e-5) -> fxfuse.Report:
    """Results equal plain eager's; the report. Both are float32: sums differ by rounding alone."""
    want = toy(*args)
    report = fxfuse.Report()
    seen: list[fxfuse.Report] = []
    backend = fxfuse.Backend(compiler="eager")

    def collecting(gm: Any, inputs: Any) -> Any:
        compiled = backend(gm, inputs)
        seen.append(fxfuse.last_report())
        return compiled

    got = torch.compile(toy, backend=collecting)(*args)
    for one in seen:
        report.add(one)
    assert_like(got, want, tolerance)
    return report


def assert_like(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    if not isinstance(want, Tensor):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_like(a, b, tolerance)
        return
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"
