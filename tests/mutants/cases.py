"""Cases: toys in every spelling, captured by Dynamo once in a process, and how a graph is run.

In: nothing. Out: `CASES`, and for each its Dynamo graph with real inputs and what its run gives.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxfuse.passes import fuse_graph
from fxfuse.report import Report
from fxfuse.settings import Settings
from tests import spellings
from tests.spellings import NORMS, ROPES, Normed, Rope, gemma, weightless
from tests.toys import Layer, Sizes, attend, by_index_copy

# Every case's eps, so large that a wrong place or a wrong stream's shows in float32.
EPS = (1e-2, 3e-2)
CACHE_SLOTS = 12
FIRST_SLOT = 3
SETTINGS = Settings(compiler="eager")


# --- what follows the rotation: q, k, v, and caches with slots ---------------------------------


def attended(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return attend(q, k, v)


def returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """A cache that is not the graph's takes k and v; q is looked at too."""
    return attend(q, k, v), q, k, v


def by_setitem(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks[:, :, slots] = k
    vs[:, :, slots] = v
    return attend(q, ks, vs)


def tokens_first(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.index_copy_(1, slots, k.transpose(1, 2))
    vs.index_copy_(1, slots, v.transpose(1, 2))
    return attend(q, ks.transpose(1, 2), vs.transpose(1, 2))


FINISHES: tuple[Callable[..., Any], ...] = (
    attended,
    by_index_copy,
    returned,
    by_setitem,
    tokens_first,
)


@dataclass(frozen=True)
class Case:
    """One toy: its spellings, its sizes and what it ends in."""

    rope: Rope
    norm: Normed | None
    finish: Callable[..., Any]
    sizes: Sizes
    packing: str = "separate"
    partial: str = "inside"
    after: bool = False
    wide: bool = False
    tokens_first: bool = False
    tokens: int = 5
    batch: int = 2
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        s, norm = self.sizes, self.norm.__name__ if self.norm else "no norm"
        place = "after" if self.after else "wide" if self.wide else "before"
        layout = "tokens first" if self.tokens_first else "heads first"
        return (
            f"{self.rope}, {norm} {place}, {self.finish.__name__}, {self.packing}, {self.partial}, "
            f"{layout}, B={self.batch} T={self.tokens} H={s.heads} G={s.kv_heads} "
            f"D={s.head_dim} R={s.rotary}, {str(self.dtype).removeprefix('torch.')}"
        )

    def toy(self) -> Layer:
        toy = Layer(
            self.finish,
            rope=self.rope,
            eps=EPS,
            after=self.after,
            wide=self.wide and self.norm is not None,
            packing=self.packing,
            partial=self.partial,
            tokens_first=self.tokens_first,
            sizes=self.sizes,
        )
        toy.norm = self.norm
        return toy.to(self.dtype)

    def inputs(self) -> list[Tensor]:
        """Hidden states, and where the case stores, caches full of noise and slots."""
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        x = draw(self.batch, self.tokens, self.sizes.hidden)
        if self.finish in (attended, returned):
            return [x]
        rows = (self.sizes.kv_heads, CACHE_SLOTS)
        shape = (self.batch, *(reversed(rows) if self.finish is tokens_first else rows))
        caches = [draw(*shape, self.sizes.head_dim) for _ in "kv"]
        return [x, *caches, torch.arange(FIRST_SLOT, FIRST_SLOT + self.tokens)]


SIZES = (Sizes(), Sizes(2, 2, 8, 8), Sizes(4, 2, 12, 8), Sizes(4, 4, 16, 16), Sizes(3, 1, 20, 16))
PACKINGS = ("separate", "by head", "one view", "slices")
WIDE = (*(n for n in NORMS if n is not spellings.squeezed), gemma)
_CASTS = (spellings.in_float, spellings.llama4, spellings.rsqrt, gemma)


def _cases() -> list[Case]:
    """Every rope once and every second again, with norms, packings and sizes in cycles that do not
    meet.
    """
    norms = itertools.cycle([*NORMS, gemma, weightless, None])
    finishes, sizes = itertools.cycle(FINISHES), itertools.cycle(SIZES)
    found = []
    for i, (rope, norm) in enumerate(zip([*ROPES, *ROPES[::-2]], norms, strict=False)):
        size, packing = next(sizes), PACKINGS[i % 4]
        if i % len(SIZES) == 0:
            next(sizes)
        if packing == "by head" and size.heads != size.kv_heads:
            packing = "slices"
        place = ("before", "before", "after", "wide", "before", "after")[i % 6]
        found.append(
            Case(
                rope,
                norm,
                next(finishes),
                size,
                packing,
                partial=("inside", "outside", "empty")[i % 3],
                after=place == "after",
                wide=place == "wide" and norm in WIDE and packing in ("separate", "slices"),
                tokens_first=i % 7 in (2, 5),
                tokens=4 + i % 2,
                batch=1 + i % 3 % 2,
                dtype=torch.float64
                if i % 2 and not {rope.turn, norm} & {*_CASTS}
                else torch.float32,
            )
        )
    return found


CASES = _cases()

# --- a captured case, and running graphs -------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Captured:
    """Dynamo's graph of a case, its inputs, what it gives; the stages of its fused sites, and how
    many of q and k they rotate.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    results: list[Any]
    stages: list[tuple[str, ...]]
    rotated: int


@functools.cache
def captured(case: Case) -> Captured:
    """The case traced, run and fused once; every later mutant starts from here."""
    seen: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append((gm, cloned(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(case.toy(), backend=keep, dynamic=False)(*case.inputs())
        ((gm, inputs),) = seen
        _, report = fuse_graph(gm, SETTINGS)
        stages = [f.stages for f in report.fused]
        return Captured(gm, inputs, run(gm, inputs), stages, rotated(report))


def rotated(report: Report) -> int:
    """How many streams the fused sites of a report rotate."""
    streams = [s for f in report.fused for s in (f.record.q, f.record.k) if s is not None]
    return sum(s.rotation is not None for s in streams)


def cloned(inputs: list[Any]) -> list[Any]:
    return [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]


def run(gm: fx.GraphModule, inputs: list[Any]) -> list[Any]:
    """What a graph returns, and then its inputs as it leaves them: caches, and all it must not
    write.
    """
    memory = cloned(inputs)
    return [*tree_leaves(gm.forward(*memory)), *memory]


def difference(got: list[Any], want: list[Any]) -> float:
    """The largest relative error of a tensor; infinite where the results cannot be compared."""
    if len(got) != len(want):
        return float("inf")
    return max(_error(a, b) for a, b in zip(got, want, strict=True))


def _error(got: Any, want: Any) -> float:
    if not isinstance(want, Tensor):
        return 0.0 if got == want else float("inf")
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return float("inf")
    got, want = got[finite], want[finite]
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0
