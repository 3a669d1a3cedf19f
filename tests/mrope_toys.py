"""A serving engine's attention prelude with three positions a token, in its native spelling.

qkv [T, (H + 2 G) D] -> split -> norm of each head of q, k -> mRoPE by position -> attention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.patterns.record import Record
from tests.toys import assert_like

# From [3, T, R / 2] to [T, R / 2]: each pair's number by the axis that it turns by.
Pick = Callable[[Tensor, list[int]], Tensor]


def contiguous(x: Tensor, section: list[int]) -> Tensor:
    return torch.cat([m[i] for i, m in enumerate(x.split(section, dim=-1))], dim=-1)


def interleaved(x: Tensor, section: list[int]) -> Tensor:
    y = x[0].clone()
    y[..., 1 : section[1] * 3 : 3] = x[1, ..., 1 : section[1] * 3 : 3]
    y[..., 2 : section[2] * 3 : 3] = x[2, ..., 2 : section[2] * 3 : 3]
    return y


def turns(section: list[int]) -> list[int]:
    """GLM's map: the axes in turn, each until its quota is spent."""
    left, axes, axis = list(section), [], 0
    while any(left):
        if left[axis % 3]:
            axes.append(axis % 3)
            left[axis % 3] -= 1
        axis += 1
    return axes


def in_turns(x: Tensor, section: list[int]) -> Tensor:
    return torch.stack([x[axis, ..., i] for i, axis in enumerate(turns(section))], dim=-1)


def in_turns_by_slices(x: Tensor, section: list[int]) -> Tensor:
    return torch.cat([x[a, ..., i : i + 1] for i, a in enumerate(turns(section))], dim=-1)


def in_turns_by_index(x: Tensor, section: list[int]) -> Tensor:
    chosen = x[torch.tensor(turns(section)), ..., torch.arange(sum(section))]
    return chosen.movedim(0, -1)


def in_turns_gathered(x: Tensor, section: list[int]) -> Tensor:
    axes = torch.tensor(turns(section), device=x.device).expand(1, *x.shape[1:])
    return x.gather(0, axes).squeeze(0)


PICKS: dict[str, Pick] = {
    "contiguous": contiguous,
    "interleaved": interleaved,
    "in turns": in_turns,
    "in turns, by slices": in_turns_by_slices,
    "in turns, by index": in_turns_by_index,
    "in turns, gathered": in_turns_gathered,
}


def axes_of(pick: str, section: list[int]) -> tuple[int, ...]:
    """The map that a pick is meant to be, written down once more."""
    pairs = sum(section)
    if pick == "contiguous":
        return tuple(axis for axis, count in enumerate(section) for _ in range(count))
    if pick == "interleaved":
        return tuple(i % 3 if i < 3 * section[i % 3] else 0 for i in range(pairs))
    return tuple(turns(section))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, neox: bool) -> Tensor:
    """x [T, heads, R], tables [T, R / 2]."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    first, second = torch.chunk(x, 2, dim=-1) if neox else (x[..., ::2], x[..., 1::2])
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=-1) if neox else torch.stack(turned, dim=-1).flatten(-2)


@dataclass(frozen=True)
class Sizes:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    section: tuple[int, ...] = (6, 5, 5)
    rows: int = 23
    hidden: int = 8

    @property
    def rotary(self) -> int:
        return 2 * sum(self.section)


class MRope(nn.Module):
    """Rotary embedding by positions [3, T] (or [T]) of q, k [T, heads * D]; the table's rows are
    [cos | sin].
    """

    def __init__(
        self,
        pick: Pick,
        neox: bool = True,
        sizes: Sizes = Sizes(),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.pick, self.neox, self.sizes = pick, neox, sizes
        generator = torch.Generator().manual_seed(2)
        angles = torch.randn(sizes.rows, sizes.rotary // 2, generator=generator)
        cache = torch.cat([angles.cos(), angles.sin()], dim=-1)
        self.register_buffer("cos_sin_cache", cache.to(dtype), persistent=False)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos_sin = self.cos_sin_cache[positions]
        cos, sin = cos_sin.chunk(2, dim=-1)
        if positions.ndim > 1:
            section = list(self.sizes.section)
            cos, sin = self.pick(cos, section), self.pick(sin, section)
        return cos, sin

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.tables(positions)
        return self.turned(q, cos, sin), self.turned(k, cos, sin)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape, width = x.shape, self.sizes.rotary
        x = x.view(cos.shape[0], -1, self.sizes.head_dim)
        turn, rest = x[..., :width], x[..., width:]
        return torch.cat((rotate(turn, cos, sin, self.neox), rest), dim=-1).reshape(shape)


class Prelude(nn.Module):
    """Projection, split, norm of q's and k's heads, mRoPE and attention over flat tokens [T, C]."""

    def __init__(self, rope: MRope, norm: bool = True, layers: int = 1) -> None:
        super().__init__()
        self.rope, self.sizes, self.norm, self.layers = rope, rope.sizes, norm, layers
        s, generator = self.sizes, torch.Generator().manual_seed(3)
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim, bias=False)
        self.out = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        weights = (torch.rand(s.head_dim, generator=generator) + 0.5 for _ in range(2))
        self.q_weight, self.k_weight = (nn.Parameter(w) for w in weights)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        by_head = x.reshape(*x.shape[:-1], -1, self.sizes.head_dim)
        wide = by_head.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        return (wide * weight.float()).to(x.dtype).view(x.shape)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.sizes
        widths = [n * s.head_dim for n in (s.heads, s.kv_heads, s.kv_heads)]
        q, k, v = self.qkv(x).split(widths, dim=-1)
        if self.norm:
            q, k = self.normed(q, self.q_weight), self.normed(k, self.k_weight)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            t.view(t.shape[0], -1, self.sizes.head_dim).transpose(0, 1)[None] for t in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return y[0].transpose(0, 1).flatten(1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for _ in range(self.layers):
            q, k, v = self.split(x)
            q, k = self.rope(positions, q, k)
            x = x + self.out(self.attend(q, k, v))
        return x


def positions(tokens: int, rows: int, seed: int = 4) -> Tensor:
    """[3, tokens] of which no two rows are alike, a window of a longer buffer; the last row of the
    table is read.
    """
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randint(0, rows, (3, tokens + 9), generator=generator)
    buffer[:, 4 + tokens // 2] = rows - 1
    return buffer[:, 4 : 4 + tokens]


TOKENS = 7
WHOLE, PARTIAL = Sizes(), Sizes(section=(4, 2, 3))


def hidden(toy: Prelude, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, toy.sizes.hidden, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def report_of(toy: Prelude, at: Tensor, compiler: str = "eager") -> fxfuse.Report:
    """The report of a toy; its result must be eager's."""
    x = hidden(toy, at.shape[-1])
    want = toy(x, at)
    got = torch.compile(toy, backend=fxfuse.Backend(compiler=compiler))(x, at)
    assert_like(got, want)
    report = fxfuse.last_report()
    assert report is not None
    return report


def looked_up(report: fxfuse.Report) -> Record | None:
    """The record of the only site, if the op looks its table up."""
    (site,) = report.fused
    assert isinstance(site.record, Record)
    return site.record if "rope(by position)" in site.stages else None
