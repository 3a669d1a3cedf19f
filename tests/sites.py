"""Records in the spellings of real models, and random operands for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.patterns.record import Cast, Layout, Norm, Pair, Pass, Record, Rotation, Store, Stream
from fxfuse.reference_store import write_

CACHES_OWN = Cast()
NORM = Norm("head", "before", has_weight=True)
LAYER = Norm("head", "before", has_weight=True, kind="layer", has_bias=True)
BARE = Norm("head", "before", has_weight=False)
Rope = tuple[Rotation | None, tuple[Pass, ...]]
# (*shape, of=a dtype) -> random numbers.
Draw = Callable[..., Tensor]


def halves(d: int, r: int | None = None, start: int = 0) -> Rope:
    """Llama's pairing on channels [start, start + r): i with i + r / 2; tables as wide as r."""
    r = d if r is None else r
    pair, table = Pair(start, start + r // 2, 1), Pair(0, r // 2, 1)
    gaps = ((0, start), (start + r, d - start - r))
    return Rotation(r // 2, pair, pair, table, table, (-1, 1)), tuple(
        Pass(s, s, n) for s, n in gaps if n
    )


def neighbours(d: int, r: int | None = None, turn: int = 1) -> Rope:
    """GPT-J's pairing: 2i with 2i + 1; tables half as wide; turn -1 rotates the other way."""
    r = d if r is None else r
    pair, table = Pair(0, 1, 2), Pair(0, 0, 1)
    passes = (Pass(r, r, d - r),) if r < d else ()
    return Rotation(r // 2, pair, pair, table, table, (-turn, turn)), passes


def wide_neighbours(d: int) -> Rope:
    """GPT-J's pairing with tables as wide as the row, each number of them twice."""
    pair = Pair(0, 1, 2)
    return Rotation(d // 2, pair, pair, pair, pair, (-1, 1)), ()


def unrotated(d: int) -> Rope:
    return None, (Pass(0, 0, d),)


def stream(d: int, rope: Rope | None = None, **fields: Any) -> Stream:
    rotation, passes = halves(d) if rope is None else rope
    return Stream(d, fields.pop("norm", None), rotation, passes, **fields)


def copied(d: int, **fields: Any) -> Stream:
    return Stream(d, None, None, (Pass(0, 0, d),), keep=False, **fields)


def cached(heads_first: bool, negative: Any = "invalid") -> Store:
    """transformers' static cache."""
    layout = Layout("bh0d" if heads_first else "b0hd")
    return Store(layout, layout, negative)


def site(
    d: int,
    rope: Rope | None = None,
    store: Store | None = None,
    with_k: bool = True,
    with_v: bool = True,
    v_channels: int | None = None,
    k_keep: bool = True,
    v_norm: Norm | None = None,
    **fields: Any,
) -> Record:
    """A record whose q and k are alike; v only where there is a store."""
    q = stream(d, rope, **fields)
    k = dataclasses.replace(q, keep=k_keep) if with_k else None
    stored = store is not None and with_v
    v = dataclasses.replace(copied(v_channels or d, dtype=q.dtype), norm=v_norm) if stored else None
    return Record(q, k, v, store)


def with_dtype(record: Record, dtype: str) -> Record:
    def changed(s: Stream | None) -> Stream | None:
        return s and dataclasses.replace(s, dtype=dtype)

    q, front = dataclasses.replace(record.q, dtype=dtype), record.front
    front = front and dataclasses.replace(front, dtype=dtype)
    return dataclasses.replace(record, q=q, k=changed(record.k), v=changed(record.v), front=front)


def paged(
    k: str, v: str, page: int = 4, split: int = 2, negative: Any = "wrap", cast: Cast = CACHES_OWN,
    given: bool = False, skipped: int | None = None,
) -> Store:  # fmt: skip
    """Caches of pages, with axes that hold `split` of a page's tokens or of a row's channels."""

    def layout(axes: str) -> Layout:
        inner = split if "2" in axes else 1
        offset = 1 if given else 0
        index = [(0, 1 if given else page, 0), (offset, inner, 0 if given else page // inner)]
        index += [(offset, 1, inner)] if "2" in axes else []
        return Layout(axes, tuple(index), cast)

    return Store(layout(k), layout(v), negative, skipped)


E4M3 = Cast("float8_e4m3fn", "divide", 1.0, 448.0)


def by_axes(rope: Rope, axes: Sequence[int]) -> Rope:
    """mRoPE: pair k turns by the position on axes[k]."""
    assert rope[0] is not None
    return dataclasses.replace(rope[0], axes=tuple(axes)), rope[1]


# Pairs by three axes: a section for each, every third pair, and GLM's turns with quotas.
SECTIONS = [0] * 4 + [1] * 6 + [2] * 6
EVERY_THIRD = [0, 1, 2] * 3 + [0, 1, 0]
IN_TURNS = [0, 1, 2] * 4 + [1, 2] * 4

# Together these take every branch of the kernel.
SITES: dict[str, Record] = {
    "qwen3": site(128, norm=NORM, store=cached(True), heads_first=True, k_keep=False),
    "llama": site(64, store=cached(False, "wrap")),
    "gptj, partial": site(48, neighbours(48, 32), norm=NORM, store=cached(True)),
    "flux": site(128, neighbours(128, turn=-1), norm=NORM),
    "middle": site(80, halves(80, 40, 20), norm=NORM, store=cached(True), v_channels=48),
    "gemma4": site(48, norm=NORM, store=cached(True, "wrap"), k_keep=False, v_norm=BARE),
    "v without a mean": site(
        20, norm=NORM, store=cached(False), v_norm=dataclasses.replace(BARE, kind="layer")
    ),
    "gemma": site(96, norm=Norm("head", "before", True, 1.0), scale=0.125, heads_first=True),
    "olmo2": site(32, norm=Norm("given", "before", True), has_scale=True),
    "after": site(40, norm=Norm("head", "after", True), has_scale=True, scale=2.0),
    "no weight": site(24, neighbours(24), norm=Norm("head", "before", False)),
    "norm alone": site(56, unrotated(56), norm=NORM, store=cached(False), k_keep=False),
    "q alone": site(64, norm=NORM, with_k=False),
    "k stored alone": site(64, norm=NORM, store=cached(True, "wrap"), with_v=False),
    "phi": site(32, norm=LAYER, store=cached(True), heads_first=True, k_keep=False),
    "layer, partial": site(48, halves(48, 20), norm=LAYER),
    "chameleon": site(16, norm=dataclasses.replace(LAYER, when="after"), store=cached(False)),
    "zaya": site(24, norm=Norm("head", "before", False, kind="l2"), has_scale=True, scale=0.5),
    "mla": Record(
        stream(48, halves(48, 16, 32)), stream(16, keep=False), copied(40), cached(True, "wrap")
    ),
    "flat cache by position": site(128, store=cached(False, "wrap")),
    "neighbours by position": site(64, neighbours(64, 32), norm=NORM),
    "pages": site(64, norm=NORM, store=paged("01hd", "01hd"), k_keep=False),
    "pages, blocks and offsets": site(32, store=paged("0h1d", "0h1d", given=True)),
    "shuffled pages": site(48, norm=NORM, store=paged("0hd1e", "0h1d2"), k_keep=False),
    "pages, skipped": site(24, neighbours(24), store=paged("01hd", "0h1d", negative="skip")),
    "pages, one slot skipped": site(24, store=paged("0hd1e", "01hd", given=True, skipped=1)),
    "8 bits": site(64, norm=NORM, store=paged("01hd", "01hd", cast=E4M3), k_keep=False),
    "8 bits, shuffled": site(
        32, neighbours(32, 16), store=paged("0hd1e", "0h1d2", cast=Cast("float8_e5m2", "multiply"))
    ),
    "mrope": site(128, by_axes(halves(128, 32), SECTIONS), norm=NORM, store=cached(False, "wrap")),
    "mrope, every third": site(
        40, by_axes(neighbours(40, 24), EVERY_THIRD), norm=NORM, k_keep=False, store=cached(True)
    ),
    "mrope, in turns": site(40, by_axes(halves(40), IN_TURNS)),
    "mrope, wide neighbours": site(16, by_axes(wide_neighbours(16), [2, 2, 0, 1, 1, 1, 0, 2])),
    "halves to neighbours": site(
        32,
        (Rotation(16, Pair(0, 16, 1), Pair(0, 1, 2), Pair(0, 0, 1), Pair(0, 0, 1), (-1, 1)), ()),
    ),
}
PER_HEAD_WEIGHTS = ("olmo2", "after", "chameleon")
# Rows of a longer table by position.
LOOKED_UP = ("flat cache by position", "neighbours by position")
BY_AXES = tuple(name for name in SITES if name.startswith("mrope"))


# Caches of bits instead of numbers.
AS_BITS = ("8 bits, shuffled",)
STORED = ["slots", "offsets", "k_cache", "v_cache", "k_cache_scale", "v_cache_scale"]


@dataclasses.dataclass
class Operands:
    """The tensors of one op call, by the op's argument names, and its record."""

    record: Record
    tensors: dict[str, Tensor | None]
    eps: tuple[float, float] = (1e-6, 1e-5)

    @property
    def stores(self) -> bool:
        return self.record.store is not None

    def arguments(self) -> tuple[Any, ...]:
        """By position, as torch.ops.fxfuse takes them."""
        names = ["q", "k", *(["v"] if self.stores else [])]
        names += ["q_weight", "k_weight", "q_bias", "k_bias"]
        names += ["q_scale", "k_scale", "cos", "sin", "positions"]
        names += STORED if self.stores else []
        found = [self.tensors.get(name) for name in names]
        return (*found, *self.eps, self.record.to_text())

    def op(self) -> Any:
        ops = torch.ops.fxfuse
        return (ops.norm_rope_store_ if self.stores else ops.norm_rope).default

    def copy(self, dtype: torch.dtype | None = None) -> Operands:
        """The same values in memory of their own, with the same strides, perhaps widened."""
        record = (
            with_dtype(self.record, str(dtype).removeprefix("torch.")) if dtype else self.record
        )

        def cloned(name: str, x: Tensor) -> Tensor:
            x = self.numbers(name) if dtype and name.endswith("cache") else x
            other = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            other.copy_(x)
            return other.to(dtype) if dtype and x.is_floating_point() else other

        tensors = {n: None if x is None else cloned(n, x) for n, x in self.tensors.items()}
        return Operands(record, tensors, self.eps)

    def numbers(self, cache: str) -> Tensor:
        """A cache as numbers, where it holds their bits."""
        store, x = self.record.store, self.tensors[cache]
        assert store is not None and x is not None
        layout = store.k if cache == "k_cache" else store.v
        return x.view(getattr(torch, layout.cast.dtype)) if x.dtype == torch.uint8 else x

    def exact(self) -> tuple[Operands, tuple[Tensor, ...]]:
        """Caches and results of the float64 reference."""
        wide = self.copy(torch.float64)
        run = reference.norm_rope_store_ if self.stores else reference.norm_rope
        return wide, run(*wide.arguments()[:-1], wide.record)


def operands(
    name: str,
    batch: int = 2,
    tokens: int = 3,
    heads: int = 5,
    kv_heads: int = 3,
    slots: int = 9,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Operands:
    """Random operands; q, k, v are views of one packed projection, caches hold 77 everywhere."""
    record = with_dtype(SITES[name], str(dtype).removeprefix("torch."))
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of)

    d, v = record.q.channels, record.v
    k_d = record.k.channels if record.k else d
    widths = (heads * d, kv_heads * k_d, kv_heads * (v.channels if v else d))
    packed = draw(batch, tokens, sum(widths)).split(widths, -1)
    rows = [
        p.unflatten(-1, (n, -1)) for p, n in zip(packed, (heads, kv_heads, kv_heads), strict=True)
    ]
    tensors: dict[str, Tensor | None] = {"q": rows[0], "k": rows[1] if record.k else None}
    tensors |= {"v": rows[2] if v else None}
    looked_up = name in LOOKED_UP + BY_AXES
    tensors |= _table(record, draw(1, 50 if looked_up else tokens, d, of=torch.float32))
    tensors |= _of_heads(record, name, {"q": heads, "k": kv_heads}, (batch, tokens), draw)
    if looked_up:
        tensors["positions"] = _positions(name, batch, tokens, generator).to(device)
    if record.store:
        by_row = batch if "b" not in record.store.k.axes else 1
        slots = max(slots, by_row * tokens)
        drawn = torch.randperm(slots, generator=generator)[: by_row * tokens].to(device)
        order = _some_negative(drawn, slots, record.store.negative).view(by_row, tokens)
        tensors["slots"] = order
        tensors |= _caches(record, name, batch, kv_heads, slots, dtype, device)
        if any(operand for operand, *_ in record.store.k.index):
            tensors |= {"slots": order // 4, "offsets": order % 4}
        if record.store.skipped is not None:
            tensors["slots"][:, ::2] = record.store.skipped
        for x in ("k", "v"):
            if record.store.k.cast.scale and tensors[f"{x}_cache"] is not None:
                shape = (1, tokens, 1) if x == "k" else (1, 1, kv_heads)
                tensors[f"{x}_cache_scale"] = 0.5 + draw(*shape, of=torch.float32).abs()
    return Operands(record, tensors)


def _table(record: Record, angle: Tensor) -> dict[str, Tensor]:
    """cos and sin in the layout of a complex table seen as real: a stride of 2 between columns."""
    table = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
    rotates = record.q.rotation is not None
    return {"cos": table[..., 0], "sin": table[..., 1]} if rotates else {}


def _of_heads(
    record: Record, name: str, heads: dict[str, int], tokens: tuple[int, int], draw: Draw
) -> dict[str, Tensor]:
    """Weights and biases of the norms, and scales of the heads."""
    found = {}
    for x, s in (("q", record.q), ("k", record.k)):
        if s is None:
            continue
        shape = (heads[x], s.channels) if name in PER_HEAD_WEIGHTS else (s.channels,)
        if s.norm and s.norm.has_weight:
            found[f"{x}_weight"] = draw(*shape)
        if s.norm and s.norm.has_bias:
            found[f"{x}_bias"] = draw(*shape)
        if s.has_scale:
            found[f"{x}_scale"] = draw(*tokens, 1, of=torch.float32)
    return found


def _positions(name: str, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """The window of a longer buffer, as engines keep them: axes lie far apart."""
    lead = (3,) if name in BY_AXES else ()
    places = torch.randint(-50, 50, (*lead, batch, tokens + 5), generator=generator)
    places[..., 2 + tokens // 2] = 49
    return places[..., 2 : 2 + tokens]


def _some_negative(order: Tensor, slots: int, negative: str) -> Tensor:
    if negative == "wrap":
        return torch.where(order % 2 == 0, order - slots, order)
    return torch.where(order % 3 == 0, -1, order) if negative == "skip" else order


def _caches(
    record: Record, name: str, batch: int, kv_heads: int, slots: int, dtype: Any, device: str
) -> dict[str, Tensor | None]:
    """Caches as their layouts have their axes; 77 everywhere, so that a stray write shows."""
    found: dict[str, Tensor | None] = {}
    assert record.store is not None
    for x, stream_, layout in (
        ("k_cache", record.k, record.store.k),
        ("v_cache", record.v, record.store.v),
    ):
        if stream_ is None:
            found[x] = None
            continue
        axes, split = layout.axes, 2
        sizes = {"b": batch, "h": kv_heads, "d": stream_.channels, "0": slots, "1": 1, "2": 1}
        if "e" in axes:
            sizes |= {"d": stream_.channels // split, "e": split}
        if "1" in axes:
            sizes |= {"0": -(-slots // 4), "1": 4 // split if "2" in axes else 4, "2": split}
        cache = torch.full([sizes[a] for a in axes], 77.0, device=device)
        if layout.cast.dtype:
            cache = cache.to(getattr(torch, layout.cast.dtype))
            cache = cache.view(torch.uint8) if name in AS_BITS else cache
        else:
            cache = cache.to(dtype)
        found[x] = cache
    return found


def untouched(case: Operands) -> bool:
    """Whether cache rows that no slot names still hold their canaries."""
    store, tensors = case.record.store, case.tensors
    assert store is not None and tensors["slots"] is not None
    at = (tensors["slots"], tensors.get("offsets"))
    for name, layout_ in (("k_cache", store.k), ("v_cache", store.v)):
        cache, rows = tensors[name], tensors[name[0]]
        if cache is None or rows is None:
            continue
        kept = torch.zeros(cache.shape, device=cache.device)
        parts = [(0, 1, torch.ones(rows.shape, device=rows.device))]
        write_(
            kept,
            dataclasses.replace(layout_, cast=Cast()),
            store,
            at,
            None,
            parts,
        )
        canary = torch.full((), 77.0, device=cache.device)
        if layout_.cast.dtype:
            canary = canary.to(getattr(torch, layout_.cast.dtype))
        canary = canary.view(torch.uint8) if cache.dtype == torch.uint8 else canary
        if not (cache[kept == 0] == canary).all():
            return False
    return True
