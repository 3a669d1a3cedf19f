"""Diffusion attentions: QK-norm and RoPE of an image segment, alone or joined with a text segment.

In: how a row turns, its table, where segments are joined, who is written to. Out: a module from
packed projections and positions to what attention gives, and `check`, which runs it compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.bench.check import InFloat64

H, D, P = 4, 16, 64
TEXT = 5
Turn = Callable[[Tensor, Tensor], Tensor]  # x [B, T, H, R], rows of the table -> turned x
Write = Callable[[Tensor, Tensor], Any]  # what is written to, what is written


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


# --- rows of a table, and how x turns by them --------------------------------------------------


def pairs_half_width(x: Tensor, rows: Tensor) -> Tensor:
    """Serving engines: rows [cos R / 2 | sin R / 2], channels 2 i and 2 i + 1."""
    cos, sin = rows.unsqueeze(-2).chunk(2, dim=-1)
    even, odd = x.float()[..., ::2], x.float()[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x)


def halves_half_width(x: Tensor, rows: Tensor) -> Tensor:
    """The same table, channels i and i + R / 2."""
    cos, sin = rows.unsqueeze(-2).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)


def pairs_full_width(x: Tensor, rows: Tensor) -> Tensor:
    """Flux: rows [cos R | sin R]."""
    cos, sin = rows.unsqueeze(-2).chunk(2, dim=-1)
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def halves_full_width(x: Tensor, rows: Tensor) -> Tensor:
    """CogView4: rows [cos R | sin R]."""
    cos, sin = rows.unsqueeze(-2).chunk(2, dim=-1)
    real, imaginary = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    turned = torch.cat([-imaginary, real], dim=-1)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def complex_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Qwen-Image: rows of R / 2 complex turns."""
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * rows.unsqueeze(-2)).flatten(3).type_as(x)


def half_width(angle: Tensor) -> Tensor:
    return torch.cat((angle.cos(), angle.sin()), -1)


def repeated_in_pairs(angle: Tensor) -> Tensor:
    return half_width(angle).repeat_interleave(2, dim=-1)


def repeated_by_halves(angle: Tensor) -> Tensor:
    return torch.cat((angle.cos(), angle.cos(), angle.sin(), angle.sin()), -1)


def differing_in_pairs(angle: Tensor) -> Tensor:
    """A legal table whose cos and sin of channels 2 i and 2 i + 1 have nothing in common."""
    other = angle.flip(-1) + 0.3
    cos = torch.stack((angle.cos(), other.cos()), -1).flatten(-2)
    sin = torch.stack((angle.sin(), other.sin()), -1).flatten(-2)
    return torch.cat((cos, sin), -1)


def unit_circle(angle: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(angle), angle)


@dataclass(frozen=True)
class Rotation:
    """A way to turn, and the table [P, ...] that it takes rows of."""

    turn: Turn
    table: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return f"{self.turn.__name__}-{self.table.__name__}"


PAIRS = Rotation(pairs_half_width, half_width)
HALVES = Rotation(halves_half_width, half_width)
CIRCLE = Rotation(complex_rows, unit_circle)
DIFFERING = Rotation(pairs_full_width, differing_in_pairs)
ROTATIONS = [
    PAIRS,
    HALVES,
    Rotation(pairs_full_width, repeated_in_pairs),
    Rotation(halves_full_width, repeated_by_halves),
    CIRCLE,
    DIFFERING,
]


# --- modules -----------------------------------------------------------------------------------


def angles(rotary: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(P, rotary // 2, generator=generator)


class Segment(nn.Module):
    """Norm weights and the rotation of text or of the image."""

    table: Tensor

    def __init__(
        self,
        rotation: Rotation,
        rotary: int = D,
        dtype: torch.dtype = torch.float32,
        table_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rotation, self.rotary = rotation, rotary
        table = rotation.table(angles(rotary))
        self.register_buffer("table", table if table_dtype is None else table.to(table_dtype))
        weight = 1 + 0.2 * draw(2, D, seed=seed).to(dtype)
        self.q_weight, self.k_weight = (nn.Parameter(w, requires_grad=False) for w in weight)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(q, self.q_weight), rms_norm(k, self.k_weight)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        rows = self.table[positions]
        if self.rotary == D:
            return self.rotation.turn(x, rows)
        part = self.rotation.turn(x[..., : self.rotary], rows)
        return torch.cat((part, x[..., self.rotary :]), dim=-1)


def split(packed: Tensor) -> list[Tensor]:
    """q, k and v [B, T, H, D], views of a packed projection."""
    return list(packed.unflatten(-1, (3 * H, D)).chunk(3, dim=-2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Alone(nn.Module):
    """One segment; `write` puts the result into q and k themselves, perhaps after the norm too."""

    def __init__(self, segment: Segment, write: Write | None = None, *, twice: bool = False):
        super().__init__()
        self.segment, self.write, self.twice = segment, write, twice

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        normed_q, normed_k = self.segment.normed(q, k)
        if self.twice and self.write is not None:
            self.write(q, normed_q)
            self.write(k, normed_k)
            normed_q, normed_k = q, k
        turned = (self.segment.turned(x, positions) for x in (normed_q, normed_k))
        if self.write is None:
            return attend(*turned, v)
        for x, y in zip((q, k), list(turned), strict=True):
            self.write(x, y)
        return attend(q, k, v)


class Packed(Alone):
    def forward(self, packed: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(*split(packed), positions)


class EachTurned(nn.Module):
    """Qwen-Image: text and image are normed and turned apart, then joined."""

    def __init__(self, text: Segment, image: Segment) -> None:
        super().__init__()
        self.text, self.image = text, image

    def forward(self, text: Tensor, image: Tensor, *positions: Tensor) -> Tensor:
        (tq, tk, tv), (iq, ik, iv) = split(text), split(image)
        tq, tk = self.text.normed(tq, tk)
        iq, ik = self.image.normed(iq, ik)
        return attend(*self.joined(((tq, iq), (tk, ik)), positions), torch.cat((tv, iv), 1))

    def joined(self, segments: Any, positions: Any) -> list[Tensor]:
        at_text, at_image = positions
        return [
            torch.cat((self.text.turned(t, at_text), self.image.turned(i, at_image)), 1)
            for t, i in segments
        ]


class JoinedTurned(EachTurned):
    """Flux: text and image are normed apart, joined, then turned together."""

    def joined(self, segments: Any, positions: Any) -> list[Tensor]:
        at = torch.cat(positions, 1)
        return [self.image.turned(torch.cat(pair, 1), at) for pair in segments]


class JoinedNormed(nn.Module):
    """Single-stream blocks: one projection of both, one norm; each segment its own positions."""

    def __init__(self, both: Segment) -> None:
        super().__init__()
        self.both = both

    def forward(self, text: Tensor, image: Tensor, *positions: Tensor) -> Tensor:
        q, k, v = split(torch.cat((text, image), 1))
        q, k = self.both.normed(q, k)
        at = torch.cat(positions, 1)
        return attend(self.both.turned(q, at), self.both.turned(k, at), v)


class GridTurned(JoinedNormed):
    """EasyAnimate: of joined rows, normed together, the image's alone turn, in place and by tables
    of a grid's three axes; those rows begin at `at`.
    """

    def __init__(self, both: Segment, grid: tuple[int, ...], at: int) -> None:
        super().__init__(both)
        self.at, self.grid = at, grid
        for i, share in enumerate(angles(D).split((2, 3, 3), dim=-1)):
            table = both.rotation.table(share[: grid[i]])
            along = [grid[i] if j == i else 1 for j in range(3)]
            self.register_buffer(f"table_{i}", table.view(*along, -1))

    def forward(self, text: Tensor, image: Tensor, *positions: Tensor) -> Tensor:
        q, k, v = split(torch.cat((text, image) if self.at else (image, text), 1))
        tables = [self.get_buffer(f"table_{i}").expand(*self.grid, -1) for i in range(3)]
        cos, sin = zip(*(x.chunk(2, dim=-1) for x in tables), strict=True)
        rows = torch.cat((*cos, *sin), -1).flatten(0, 2)[None]
        normed = self.both.normed(q, k)
        for x in normed:
            there = x[:, self.at : self.at + image.shape[1]]
            there.copy_(self.both.rotation.turn(there, rows))
        return attend(*normed, v)


# --- how the tests drive them ------------------------------------------------------------------


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(*shape: int, seed: int = 2, dtype: torch.dtype = torch.int64) -> Tensor:
    """Random positions; the last one of each batch row is the table's last."""
    at = torch.randint(P, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    at[:, -1] = P - 1
    return at


@torch.no_grad()
def check(toy: nn.Module, *inputs: Tensor, compiler: str = "eager") -> fxfuse.Report:
    """The report; the result, and what was written to, are no further from float64 than eager's by
    more than one rounding.
    """
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with InFloat64():
        want = [copy.deepcopy(toy).double()(*wide), *wide]
    given, theirs = ([x.clone() for x in inputs] for _ in range(2))
    plain = [toy(*theirs), *theirs]
    got = [torch.compile(toy, backend=fxfuse.Backend(compiler=compiler))(*given), *given]
    for mine, eager, truth in zip(got, plain, want, strict=True):
        assert mine.dtype == eager.dtype and mine.shape == eager.shape
        if truth.is_floating_point():
            rounding = torch.finfo(mine.dtype).eps / 2
            assert error(mine, truth) <= error(eager, truth) + rounding
        else:
            assert torch.equal(mine, eager)
    report = fxfuse.last_report()
    assert report is not None
    return report


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())
