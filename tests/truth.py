"""What the ops mean, written once more: in float64, by plain formulas and loops over tokens.

In comes one call's operands, out come its results and caches as numbers before they are rounded.
Nothing here is shared with the package but the record itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxfuse.patterns.record import Cast, Layout, Norm, Rotation, Store, Stream
from tests.sites import Operands

Array = np.ndarray[Any, Any]


@dataclasses.dataclass
class Numbers:
    """values, and how far float32 arithmetic may lie from them: `slack` of the largest number of a
    row, 0 where a row is only copied. `written` is false where a cache is left as it was.
    """

    values: Array
    slack: Array
    written: Array


def truth(case: Operands) -> dict[str, Numbers]:
    """q_out, k_out (where it is kept), k_cache and v_cache of a call, by their names."""
    record, found = case.record, dict[str, Numbers]()
    x = {name: _numbers(t) for name, t in case.tensors.items() if "cache" not in name}
    eps = {"q": case.eps[0], "k": case.eps[1], "v": case.eps[1]}
    for name, stream in (("q", record.q), ("k", record.k), ("v", record.v)):
        if stream is None:
            continue
        rows, slack = rows_of(name, stream, x, eps[name])
        if name == "q" or stream.keep:
            found[f"{name}_out"] = Numbers(rows, slack, np.ones(rows.shape, bool))
        cache = case.tensors.get(f"{name}_cache")
        if name != "q" and record.store is not None and cache is not None:
            layout = record.store.k if name == "k" else record.store.v
            scale = _numbers(case.tensors.get(f"{name}_cache_scale"))
            rows, slack = cast(rows, slack, layout.cast, scale)
            at = (x["slots"], x.get("offsets"))
            found[f"{name}_cache"] = stored(rows, slack, layout, record.store, at, cache)
    return found


def _numbers(x: Tensor | None) -> Array | None:
    if x is None:
        return None
    return (x.detach().cpu().double() if x.is_floating_point() else x.cpu().long()).numpy()


def rows_of(name: str, stream: Stream, x: dict[str, Array], eps: float) -> tuple[Array, Array]:
    """A stream's rows [B, T, H, D] and their slack [B, T, H, 1]."""
    y, norm = x[name], stream.norm
    weight, bias = x.get(f"{name}_weight"), x.get(f"{name}_bias")
    if norm is not None and norm.when == "before":
        y = normed(y, norm, weight, bias, eps)
    y = placed(y, stream, x.get("cos"), x.get("sin"), x.get("positions"))
    if norm is not None and norm.when == "after":
        y = normed(y, norm, weight, bias, eps)
    if stream.has_scale:
        y = y * x[f"{name}_scale"][..., None]
    y = y * stream.scale
    copied = norm is None and stream.rotation is None and not stream.has_scale
    share = 0.0 if copied and stream.scale == 1.0 else 2e-6
    return y, share * np.abs(y).max(-1, keepdims=True)


def normed(x: Array, norm: Norm, weight: Array | None, bias: Array | None, eps: float) -> Array:
    if norm.over == "head" and norm.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    if norm.over == "head":
        mean = (x * x).mean(-1, keepdims=True)
        x = x / (np.maximum(np.sqrt(mean), eps) if norm.kind == "l2" else np.sqrt(mean + eps))
    x = x if weight is None else x * (weight + norm.weight_offset)
    return x if bias is None else x + bias


def placed(
    x: Array, stream: Stream, cos: Array | None, sin: Array | None, positions: Array | None
) -> Array:
    """Rotated pairs, one after the other, and what passes through."""
    y, turn = np.full_like(x, np.nan), stream.rotation
    for run in stream.passes:
        for i in range(run.length):
            y[..., run.y_start + i] = x[..., run.x_start + i]
    for k in range(turn.pairs if turn is not None else 0):
        assert turn is not None and cos is not None and sin is not None

        def of(table: Array, first: int, step: int, pair: int = k, turn: Rotation = turn) -> Array:
            column = table[..., first + step * pair]
            if positions is None:
                return column[..., None]
            at = positions[turn.axes[pair]] if turn.axes else positions
            return column[0, at][..., None]

        a = x[..., turn.x.first + turn.x.step * k]
        b = x[..., turn.x.second + turn.x.step * k]
        cos_a, cos_b = (
            of(cos, turn.cos.first, turn.cos.step),
            of(cos, turn.cos.second, turn.cos.step),
        )
        sin_a, sin_b = (
            of(sin, turn.sin.first, turn.sin.step),
            of(sin, turn.sin.second, turn.sin.step),
        )
        y[..., turn.y.first + turn.y.step * k] = a * cos_a + turn.signs[0] * b * sin_a
        y[..., turn.y.second + turn.y.step * k] = b * cos_b + turn.signs[1] * a * sin_b
    return y


def cast(rows: Array, slack: Array, how: Cast, scale: Array | None) -> tuple[Array, Array]:
    """Rows as a cache's numbers, before they are rounded."""
    if not how.dtype:
        return rows, slack
    by = np.asarray(1.0) if scale is None else scale[..., None]
    by = (1 / by if how.scale == "divide" else by) * how.factor
    rows = rows * by
    slack = 3e-6 * np.abs(rows).max(-1, keepdims=True)
    return np.clip(rows, -how.limit, how.limit) if how.limit else rows, slack


def stored(
    rows: Array, slack: Array, layout: Layout, store: Store,
    at: tuple[Array, Array | None], cache: Tensor,
) -> Numbers:  # fmt: skip
    """A cache after its rows, token after token."""
    axes = layout.axes
    order = [axes.index(letter) for letter in "b012hde" if letter in axes]
    values, far, written = (np.zeros(cache.shape, kind) for kind in (float, float, bool))
    inner = (-1, cache.shape[axes.index("e")]) if "e" in axes else (-1,)
    for b in range(rows.shape[0]):
        for t in range(rows.shape[1]):
            index = place(layout, at, 0 if "b" in axes else b, t)
            slot = at[0][0 if "b" in axes else b, t]
            if slot == store.skipped or (store.negative == "skip" and index[0] < 0):
                continue
            where = (b, *index) if "b" in axes else index
            one = rows[b, t].reshape(len(rows[b, t]), *inner)
            reach = np.broadcast_to(slack[b, t], rows[b, t].shape).reshape(one.shape)
            values.transpose(order)[where] = one if "h" in axes else one[0]
            far.transpose(order)[where] = reach if "h" in axes else reach[0]
            written.transpose(order)[where] = True
    return Numbers(values, far, written)


def place(layout: Layout, at: tuple[Array, Array | None], b: int, t: int) -> tuple[int, ...]:
    """A token's indices into a cache; Python has what lies below 0 count from the end."""
    found = []
    for operand, divisor, modulus in layout.index:
        given = at[operand]
        assert given is not None
        i = int(given[b, t]) // divisor
        found.append(i % modulus if modulus else i)
    return tuple(found)


def is_one_rounding(got: Tensor, want: Numbers) -> bool:
    """Whether each number is what a rounding to its dtype makes of something within the slack."""
    got = got.detach().cpu()
    low, high = (
        torch.from_numpy(want.values + sign * want.slack).to(got.dtype).double() for sign in (-1, 1)
    )
    x = got.double()
    missing = low.isnan().int() + high.isnan().int()  # past the largest number of some formats
    inside = (low.isnan() | (x >= low)) & (high.isnan() | (x <= high))
    right = torch.where(x.isnan(), missing > 0, inside & (missing < 2))
    return bool((right | ~torch.from_numpy(want.written)).all())
