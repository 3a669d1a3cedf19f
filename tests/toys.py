"""Toy attention modules, and how the tests drive them.

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
from tests.spellings import Normed, Rope, llama, rsqrt

LLAMA = Rope(llama)


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
        rope: Rope = LLAMA,
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
        y = x if self.packing == "separate" else self.project(x)
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
    got, want = got.double(), want.double()
    whole = torch.where(want.isfinite(), want, 0.0).norm().clamp_min(1e-30)
    same = (got == want) | (got.isnan() & want.isnan())
    got, want = (torch.where(same, 0.0, x) for x in (got, want))
    error = (got - want).norm() / whole
    assert error <= tolerance, f"relative error {error:.1e}"


# --- layers with caches ------------------------------------------------------------

B, T, G, D, S = 2, 5, 2, 16, 12
SLOTS = torch.tensor([3, 4, 5, 6, 7])
Finish = Callable[..., Any]


class Layer(Attention):
    """`finish(q, k, v, *memory)` is what the layer returns."""

    def __init__(self, finish: Finish, **kwargs: Any) -> None:
        super().__init__(norm=rsqrt, **kwargs)
        self.finish = finish

    def forward(self, x: Tensor, *memory: Tensor) -> Any:  # type: ignore[override]
        q, k, v = self.split(x)
        q, k = self.prelude(q, k, *self.tables(torch.arange(x.shape[1])))
        return self.finish(q, k, v, *memory)


def caches() -> list[Tensor]:
    """Empty slots hold canaries."""
    return [torch.full((B, G, S, D), 3.0), torch.full((B, G, S, D), 4.0), SLOTS.clone()]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@torch.no_grad()
def check(finish: Finish | Attention, memory: Callable[[], list[Tensor]] = caches) -> fxfuse.Report:
    """Compiled, outputs and memory are eager's; the report."""
    layer = finish if isinstance(finish, Attention) else Layer(finish)
    want_memory, got_memory = memory(), memory()
    want = layer(hidden_states(T), *want_memory)
    got = torch.compile(layer, backend=fxfuse.Backend(compiler="eager"))(
        hidden_states(T), *got_memory
    )
    assert_like(got, want)
    assert_like(got_memory, want_memory)
    report = fxfuse.last_report()
    assert report is not None
    return report


def stages(report: fxfuse.Report) -> list[str]:
    """What was stored with each fused site: `store(k,v)`, `store(k)` or nothing."""
    return ["".join(s for s in f.stages if s.startswith("store")) for f in report.fused]


def by_index_copy(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.index_copy_(2, slots, k)
    vs.index_copy_(2, slots, v)
    return attend(q, ks, vs)
