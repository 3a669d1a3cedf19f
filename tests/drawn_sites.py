"""Whole records and operands, drawn: what a site is comes from hypothesis, what is in its tensors
and how they lie in memory from a seed.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.patterns.record import Cast, Norm, Pair, Pass, Record, Rotation, Store, Stream
from tests.sites import CACHES_OWN, Operands, copied, paged

CHANNELS = (16, 24, 40, 48, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz")
PAIRINGS = {
    "halves": lambda start, pairs: Pair(start, start + pairs, 1),
    "neighbours": lambda start, pairs: Pair(start, start + 1, 2),
    "neighbours, second first": lambda start, pairs: Pair(start + 1, start, 2),
}
TABLES = {
    "half": lambda start, pairs: Pair(start, start, 1),
    "halves": lambda start, pairs: Pair(start, start + pairs, 1),
    "neighbours": lambda start, pairs: Pair(start, start + 1, 2),
}
STATIC = ("bh0d", "b0hd", "hb0d")
FLAT = ("0hd", "h0d", "hd0", "0dh")
PAGES = ("01hd", "0h1d", "h01d", "0hd1", "0hd1e", "01hde", "0h1d2", "012hd")
CANARY = 77.0
# Slots that are skipped by name: from the end, inside of a cache, behind it.
SKIPPED = (-1, -7, 0, 2, 10**6)


@dataclasses.dataclass(frozen=True)
class Site:
    """A record, and what else of its operands a kernel is compiled for.

    length    rows of the tables that positions choose from, 0 where tables are by token
    axes      rows of the positions, 0 for one position a token
    by_head   weights are [H, D]
    bits      8-bit caches come as uint8
    """

    record: Record
    heads: int
    kv_heads: int
    rows: torch.dtype
    weights: torch.dtype
    tables: torch.dtype
    integers: torch.dtype
    length: int
    axes: int
    page: int
    split: int
    by_head: bool
    bits: bool


@st.composite
def sites(draw: st.DrawFn, formats: Sequence[str] = FORMATS) -> Site:
    """Any site that the op takes."""
    heads, kv_heads = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 3, 4, 8, 13]))
    rows = draw(st.sampled_from(DTYPES))
    by_position = draw(st.booleans())
    turn = draw(turns(by_position)) if draw(st.integers(0, 5)) else None
    q = draw(streams(turn))
    k = None
    if draw(st.integers(0, 5)):
        k = draw(st.one_of(st.just(q), streams(turn), streams(None)))
    split = draw(st.sampled_from([1, 2, 4, 8]))
    page = split * draw(st.integers(1, 5))
    store, v = None, None
    if k is not None and draw(st.integers(0, 3)):
        store = draw(stores(page, split, kv_heads, formats))
        k = dataclasses.replace(k, keep=draw(st.booleans()))
        if draw(st.integers(0, 3)):
            v = copied(draw(st.sampled_from(CHANNELS)), dtype=str(rows).removeprefix("torch."))
            kind = draw(st.sampled_from(["", "", "rms", "l2", "layer"]))
            norm = Norm("head", "before", False, kind=kind) if kind else None
            half, swaps = v.channels // 2, kind and draw(st.booleans()) and v.channels % 2 == 0
            runs = (Pass(0, half, half), Pass(half, 0, half)) if swaps else v.passes
            v = dataclasses.replace(v, norm=norm, passes=runs)
    if k is not None and store is not None and not store.k.cast.dtype:
        k = dataclasses.replace(k, dtype=q.dtype)
    pair_axes = turn.axes if turn is not None else ()
    return Site(
        Record(q, k, v, store),
        heads,
        kv_heads,
        rows,
        draw(st.sampled_from([rows, torch.float32])),
        draw(st.sampled_from([rows, torch.float32])),
        draw(st.sampled_from([torch.int64, torch.int32])),
        draw(st.integers(1, 60)) if turn is not None and by_position else 0,
        max(pair_axes) + 1 + draw(st.integers(0, 1)) if pair_axes else 0,
        page,
        split,
        draw(st.booleans()),
        draw(st.booleans()),
    )


@st.composite
def turns(draw: st.DrawFn, by_position: bool) -> Rotation:
    """A rotation of the first channels of a row; its tables may begin anywhere."""
    pairs = draw(
        st.one_of(st.sampled_from([1, 16, 32, 64]), st.integers(1, 40), st.integers(1, 128))
    )
    cos, sin = (
        TABLES[draw(st.sampled_from(sorted(TABLES)))](draw(st.sampled_from([0, 0, 3])), pairs)
        for _ in range(2)
    )
    signs = draw(st.sampled_from([(-1, 1), (1, -1)]))
    axes = draw(maps(pairs)) if by_position and draw(st.booleans()) else ()
    return Rotation(pairs, Pair(0, 0, 1), Pair(0, 0, 1), cos, sin, signs, axes=axes)


@st.composite
def maps(draw: st.DrawFn, pairs: int) -> tuple[int, ...]:
    """The axis of each pair: in sections, in turns, or in turns up to quotas."""
    ends = sorted(draw(st.integers(0, pairs)) for _ in range(2))
    kind = draw(st.sampled_from(["sections", "turns", "quotas"]))
    if kind == "sections":
        return tuple(sum(i >= end for end in ends) for i in range(pairs))
    if kind == "turns":
        return tuple(i % 3 if i < ends[1] else 0 for i in range(pairs))
    return tuple(i % 3 if i < ends[0] else 1 + i % 2 for i in range(pairs))


@st.composite
def streams(draw: st.DrawFn, turn: Rotation | None) -> Stream:
    """A stream that turns so, from whichever channel on."""
    width = 2 * turn.pairs if turn is not None else 0
    channels = draw(st.sampled_from([d for d in CHANNELS if d >= width]))
    passes: tuple[Pass, ...] = (Pass(0, 0, channels),)
    if turn is not None:
        start = draw(st.sampled_from(sorted({0, (channels - width) // 2, channels - width})))
        moves = start in (0, channels - width) and draw(st.booleans())
        to = channels - width - start if moves else start
        passes = _rest(channels, width, start, to)
        x, y = (draw(st.sampled_from(sorted(PAIRINGS))) for _ in range(2))
        turn = dataclasses.replace(
            turn, x=PAIRINGS[x](start, turn.pairs), y=PAIRINGS[y](to, turn.pairs)
        )
    norm = draw(norms()) if draw(st.integers(0, 3)) else None
    return Stream(
        channels,
        norm,
        turn,
        passes,
        has_scale=draw(st.booleans()) if norm is None or norm.over == "head" else True,
        scale=draw(st.sampled_from([1.0, 0.125])),
        dtype=str(draw(st.sampled_from(DTYPES))).removeprefix("torch."),
        heads_first=draw(st.booleans()),
    )


def _rest(channels: int, width: int, start: int, to: int) -> tuple[Pass, ...]:
    """What passes where [start, start + width) goes to [to, to + width)."""
    if start != to:
        return (Pass(0, width, start) if start else Pass(width, 0, to),)
    gaps = ((0, start), (start + width, channels - start - width))
    return tuple(Pass(s, s, n) for s, n in gaps if n)


@st.composite
def norms(draw: st.DrawFn) -> Norm:
    weight = draw(st.booleans())
    return Norm(
        draw(st.sampled_from(["head", "head", "head", "given"])),
        draw(st.sampled_from(["before", "before", "after"])),
        weight,
        draw(st.sampled_from([0.0, 1.0])) if weight else 0.0,
        draw(st.sampled_from(["rms", "rms", "l2", "layer"])),
        weight and draw(st.booleans()),
    )


@st.composite
def stores(draw: st.DrawFn, page: int, split: int, kv_heads: int, formats: Sequence[str]) -> Store:
    """Caches of one family, each with axes and a cast of its own."""
    family = draw(st.sampled_from([STATIC, FLAT, PAGES, PAGES]))
    family = (*family, "0d") if family is FLAT and kv_heads == 1 else family
    negative = draw(st.sampled_from(["invalid", "wrap", "skip"]))
    given = family is PAGES and draw(st.booleans())
    k, v = (draw(st.sampled_from(family)) for _ in range(2))
    if family is not PAGES:
        both = paged(k, v, negative=negative)
        flat = [dataclasses.replace(layout, index=((0, 1, 0),)) for layout in (both.k, both.v)]
    else:
        both = paged(k, v, page, split, negative, given=given)
        flat = [both.k, both.v]
    layouts = [dataclasses.replace(layout, cast=draw(casts(formats))) for layout in flat]
    return Store(layouts[0], layouts[1], negative, draw(st.sampled_from([None, None, *SKIPPED])))


@st.composite
def casts(draw: st.DrawFn, formats: Sequence[str]) -> Cast:
    if draw(st.booleans()):
        return CACHES_OWN
    dtype = draw(st.sampled_from(formats))
    most = torch.finfo(getattr(torch, dtype)).max
    return Cast(
        dtype,
        draw(st.sampled_from(["", "divide", "multiply"])),
        draw(st.sampled_from([1.0, 0.5, 300.0])),
        draw(st.sampled_from([0.0, most, 3.0])),
    )


@dataclasses.dataclass
class Drawn:
    """A call's operands; the memory that each cache is a part of, and which part it is."""

    case: Operands
    pools: dict[str, tuple[Tensor, Tensor]]

    def canaries(self, cache: str, written: Tensor) -> bool:
        """Whether what lies around a cache, and in it outside `written`, is as it was."""
        whole, inside = self.pools[cache]
        x = self.case.tensors[cache]
        assert x is not None
        number = self.case.numbers(cache).dtype
        bits = torch.full((1,), CANARY).to(number).view(INTEGERS[number.itemsize]).to(x.device)
        kept = whole.view(bits.dtype) == bits
        left = x.view(bits.dtype) == bits
        return bool(kept[~inside].all() and left[~written.to(x.device)].all())


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Memory:
    """Tensors drawn from a seed, each a part of a larger one whose axes stand in any order."""

    def __init__(self, seed: int, device: str) -> None:
        self.random, self.device = random.Random(seed), device
        self.generator = torch.Generator().manual_seed(seed)

    def part(self, shape: Sequence[int], fill: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A part of a tensor full of `fill`, the whole, and which elements are the part's."""
        order = self.random.sample(range(len(shape)), len(shape))
        room = [self.random.choice((0, 0, 1, 3)) for _ in order]
        sizes = [shape[i] for i in order]
        around = list(zip(sizes, room, strict=True))
        whole = fill.to(self.device).repeat([size + 2 * n for size, n in around])
        window = tuple(slice(n, n + size) for size, n in around)
        inside = torch.zeros(whole.shape, dtype=torch.bool, device=self.device)
        inside[window] = True
        return whole[window].permute([order.index(i) for i in range(len(shape))]), whole, inside

    def numbers(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Normally distributed, amid NaN."""
        x, *_ = self.part(shape, torch.full((1,), torch.nan, dtype=dtype))
        return x.copy_(torch.randn(*shape, generator=self.generator))

    def dense(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `numbers`, contiguous: the launch hands weights over so."""
        rows = [shape[0] + 2, *shape[1:]]
        x = torch.full(rows, torch.nan, dtype=dtype, device=self.device)[1:-1]
        return x.copy_(torch.randn(*shape, generator=self.generator))

    def integers(self, shape: Sequence[int], values: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Values in order, amid numbers that are none of a table or a cache."""
        x, *_ = self.part(shape, torch.full((1,), -99999, dtype=dtype))
        return x.copy_(torch.tensor(values, dtype=dtype).view(tuple(shape)))

    def some(self, *sizes: int) -> tuple[int, ...]:
        """Each size, or 1."""
        return tuple(self.random.choice((n, n, 1)) for n in sizes)


def drawn(site: Site, batch: int, tokens: int, seed: int, device: str = "cpu") -> Drawn:
    """Operands of a site; the same for the same numbers."""
    memory, record, heads = Memory(seed, device), site.record, site.kv_heads
    tensors: dict[str, Tensor | None] = {"q": None, "k": None, "v": None}
    for name, stream, n in (
        ("q", record.q, site.heads), ("k", record.k, heads), ("v", record.v, heads),
    ):  # fmt: skip
        if stream is None:
            continue
        tensors[name] = memory.numbers((batch, tokens, n, stream.channels), site.rows)
        weight = (n, stream.channels) if site.by_head else (stream.channels,)
        if stream.norm and stream.norm.has_weight:
            tensors[f"{name}_weight"] = memory.dense(weight, site.weights)
        if stream.norm and stream.norm.has_bias:
            tensors[f"{name}_bias"] = memory.dense(weight, site.weights)
        if stream.has_scale:
            shape = memory.some(batch, tokens, n)
            tensors[f"{name}_scale"] = memory.numbers(shape, torch.float32)
    if record.q.rotation is not None:
        tensors |= _tables(memory, site, record.q.rotation, batch, tokens)
    pools = _caches(memory, site, tensors, batch, tokens) if record.store else {}
    eps = (10.0 ** memory.random.uniform(-7, -1), 10.0 ** memory.random.uniform(-7, -1))
    return Drawn(Operands(record, tensors, eps), pools)


def _tables(
    memory: Memory, site: Site, turn: Rotation, batch: int, tokens: int
) -> dict[str, Tensor]:
    lead = (1, site.length) if site.length else memory.some(batch, tokens)
    found = {}
    for name, pair in (("cos", turn.cos), ("sin", turn.sin)):
        width = max(pair.first, pair.second) + pair.step * (turn.pairs - 1) + 1
        found[name] = memory.numbers((*lead, width + memory.random.choice((0, 2))), site.tables)
    if site.length:
        shape = memory.some(batch, tokens)
        shape = (site.axes, *shape) if site.axes else shape
        n = site.length
        values = [memory.random.choice((n - 1, -n, memory.random.randrange(-n, n)))
                  for _ in range(math.prod(shape))]  # fmt: skip
        found["positions"] = memory.integers(shape, values, site.integers)
    return found


def _caches(
    memory: Memory, site: Site, tensors: dict[str, Tensor | None], batch: int, tokens: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Caches, their scales and slots, entered into `tensors`; and the pools that they are in."""
    record, pools = site.record, dict[str, tuple[Tensor, Tensor]]()
    store = record.store
    assert store is not None
    is_paged, one_row = "1" in store.k.axes, "b" in store.k.axes
    rows = 1 if one_row else batch
    places = rows * tokens + memory.random.randrange(1, 9)
    places = -(-places // site.page) * site.page if is_paged else places
    for name, stream, layout in (("k", record.k, store.k), ("v", record.v, store.v)):
        if stream is None:
            continue
        sizes = {"b": batch, "h": site.kv_heads, "d": stream.channels, "0": places}
        inner = site.split if "2" in layout.axes else 1
        sizes |= {"0": places // site.page} if is_paged else {}
        sizes |= {"1": site.page // inner, "2": inner}
        if "e" in layout.axes:
            sizes |= {"d": stream.channels // site.split, "e": site.split}
        dtype = getattr(torch, layout.cast.dtype or stream.dtype)
        fill = torch.full((1,), CANARY).to(dtype)
        fill = fill.view(torch.uint8) if layout.cast.dtype and site.bits else fill
        cache, *pool = memory.part([sizes[a] for a in layout.axes], fill)
        tensors[f"{name}_cache"], pools[f"{name}_cache"] = cache, (pool[0], pool[1])
        if layout.cast.scale:
            shape = memory.some(batch, tokens, site.kv_heads)
            scale = memory.numbers(shape, torch.float32)
            tensors[f"{name}_cache_scale"] = scale.exp_()
    _slots(memory, site, store, tensors, rows, tokens, places)
    return pools


def _slots(
    memory: Memory, site: Site, store: Store, tensors: dict[str, Tensor | None],
    rows: int, tokens: int, places: int,
) -> None:  # fmt: skip
    """Different slots in any order; some below 0 where that means something."""
    slots = memory.random.sample(range(places), rows * tokens)
    share = memory.random.choice((0.0, 0.3, 1.0))
    below = [memory.random.random() < share for _ in slots]
    if store.negative == "wrap":
        slots = [s - places if low else s for s, low in zip(slots, below, strict=True)]
    elif store.negative == "skip":
        slots = [-1 if low else s for s, low in zip(slots, below, strict=True)]
    if any(operand for operand, *_ in store.k.index):
        offsets = [s % site.page for s in slots]
        if store.negative == "wrap":
            offsets = [o - site.page * memory.random.randrange(2) for o in offsets]
        tensors["offsets"] = memory.integers((rows, tokens), offsets, site.integers)
        slots = [s // site.page for s in slots]
    if store.skipped is not None:
        slots = [store.skipped if memory.random.random() < share else s for s in slots]
    tensors["slots"] = memory.integers((rows, tokens), slots, site.integers)
