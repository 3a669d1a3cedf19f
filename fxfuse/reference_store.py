"""The store of the reference: rows cast to a cache's numbers and put where its layout says."""

import dataclasses

import torch
from torch import Tensor

from fxfuse.patterns.record import Cast, Layout, Store, Stream

aten = torch.ops.aten

# start, step and values of some of a row's channels: row[..., start + step * i] = values[..., i].
Part = tuple[int, int, Tensor]


def write_(
    cache: Tensor,
    layout: Layout,
    store: Store,
    at: tuple[Tensor, Tensor | None],
    scale: Tensor | None,
    parts: list[Part],
) -> None:
    """cache[..., indices, ...] = cast(rows).

    Shapes: cache as the layout's axes; at [B | 1, T]; scale [B | 1, T | 1, G | 1]; parts of rows
        [B, T, G, D], one part where channels are split.
    Mutates: cache, in place. An index below 0 counts from its axis' end, as index_put_ has it; a
        row is left out where `is_skipped` says so.
    """
    axes, skipped = layout.axes, is_skipped(store, layout, at)
    indices = [index_of(at[operand], by, of) for operand, by, of in layout.index]
    parts = [(start, step, cast_rows(x, layout.cast, scale, cache)) for start, step, x in parts]
    if "e" in axes:
        inner = cache.shape[axes.index("e")]
        whole = parts[0][2]
        rows = whole.view(*whole.shape[:-1], whole.shape[-1] // inner, inner)
        parts = [(0, 1, rows)]
    for start, step, rows_ in parts:
        where = cache if "e" in axes else _channels(cache, axes, start, step, rows_.shape[-1])
        _put(where, axes, indices, rows_, skipped)


def is_skipped(store: Store, layout: Layout, at: tuple[Tensor, Tensor | None]) -> Tensor | None:
    """For each slot whether its row is not written; None where every row is."""
    operand, by, of = layout.index[0]
    below = index_of(at[operand], by, of) < 0 if store.negative == "skip" else None
    if store.skipped is None:
        return below
    named = at[0].long() == store.skipped
    return named if below is None else below | named


def index_of(x: Tensor | None, divisor: int, modulus: int) -> Tensor:
    """x // divisor % modulus, both as Python has them."""
    assert x is not None
    x = x.long()
    x = x if divisor == 1 else torch.div(x, divisor, rounding_mode="floor")
    return x % modulus if modulus else x


def unrounded(stream: Stream, layout: Layout) -> Stream:
    """The stream whose rows a cast rounds: float32 where the cache has another format."""
    if not layout.cast.dtype or stream.dtype == "float64":
        return stream
    return dataclasses.replace(stream, dtype="float32")


def cast_rows(x: Tensor, cast: Cast, scale: Tensor | None, cache: Tensor) -> Tensor:
    """Rows as the cache's numbers, rounded once."""
    if not cast.dtype:
        return x.to(cache.dtype)
    if cast.scale and scale is not None:
        by = scale.to(x.dtype).unsqueeze(-1)
        x = x / by if cast.scale == "divide" else x * by
    x = x * cast.factor if cast.factor != 1.0 else x
    x = x.clamp(-cast.limit, cast.limit) if cast.limit else x
    if cache.dtype.is_floating_point and cache.dtype.itemsize > 1:
        return x.to(cache.dtype)  # a wider cache shows what is rounded: the truth of tests
    x = x.to(getattr(torch, cast.dtype))
    return x.view(torch.uint8) if cache.dtype == torch.uint8 else x


def _channels(cache: Tensor, axes: str, start: int, step: int, length: int) -> Tensor:
    """Some of a cache's channels, as a view."""
    index = [slice(None)] * len(axes)
    index[axes.index("d")] = slice(start, start + step * (length - 1) + 1, step)
    return cache[tuple(index)]


def _put(
    where: Tensor, axes: str, indices: list[Tensor], rows: Tensor, skipped: Tensor | None
) -> None:
    """index_put_ of rows [B, T, G, D(, E)] along the indexed axes."""
    if skipped is not None:
        indices, rows = _without_skipped(where, axes, indices, rows, ~skipped.flatten())
    dims = [i for i, x in enumerate(axes) if x.isdigit()]
    free = [x for x in axes if not x.isdigit()]
    neighbours = dims[-1] - dims[0] < len(dims)
    before = dims[0] if neighbours else 0
    one_row = "b" in axes
    walked = ["t"] if one_row else ["b", "t"]
    places: list[Tensor | None] = [None] * len(axes)
    for dim in dims:
        index = indices[int(axes[dim])]
        places[dim] = index[0] if one_row else index
    order = [*free[:before], *walked, *free[before:]]
    aten.index_put_(where, places, _ordered(rows, order))


def _ordered(rows: Tensor, order: list[str]) -> Tensor:
    """Rows [B, T, G, D(, E)] with the axes of `order`, "_" one of size 1."""
    named = [x for x in order if x != "_"]
    for letter in "hb":
        if letter not in named:
            rows = rows.squeeze("bth".index(letter))
    given = [x for x in "bthde" if x in named]
    rows = rows.permute([given.index(x) for x in named])
    for place, letter in enumerate(order):
        rows = rows.unsqueeze(place) if letter == "_" else rows
    return rows


def _without_skipped(
    where: Tensor, axes: str, indices: list[Tensor], rows: Tensor, kept: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Rows that are skipped written as the last one that is `kept`, which no other row overwrites;
    where none is, what the cache holds in its first slot.
    """
    tokens = torch.arange(kept.shape[0], device=kept.device)
    # One more, so that there is a largest of no tokens too.
    last = torch.nn.functional.pad(torch.where(kept, tokens, 0), (0, 1)).amax()
    source = torch.where(kept, tokens, last)
    indices = [(i.flatten()[source] * kept.any()).unsqueeze(0) for i in indices]
    rows = rows if "b" in axes else rows.flatten(0, 1).unsqueeze(0)
    rows = rows[:, source]
    present = _first_row(where, axes).to(rows.dtype)
    if rows.dtype.itemsize == 1:
        bits = torch.where(kept.any(), rows.view(torch.uint8), present.view(torch.uint8))
        return indices, bits.view(rows.dtype)
    return indices, torch.where(kept.any(), rows, present)


def _first_row(where: Tensor, axes: str) -> Tensor:
    """What the first slot holds, as [B | 1, 1, G | 1, D(, E)]."""
    for dim in reversed(range(len(axes))):
        if axes[dim].isdigit() or axes[dim] == "_":
            where = where.select(dim, 0)
    named = [x for x in axes if not x.isdigit() and x != "_"]
    where = where.permute([named.index(x) for x in "bhde" if x in named])
    where = where if "b" in named else where.unsqueeze(0)
    where = where if "h" in named else where.unsqueeze(1)
    return where.unsqueeze(1)
