"""The fused ops in plain PyTorch: the truth for tests and proofs, and the path without kernels.

In comes what an op takes, with its record already read; out come the op's results, laid out in no
particular memory order. Everything is functional but the cache store, differentiable, and made of
ATen calls whose sizes may be symbolic: the loop provider lowers a trace of these very functions.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxfuse.patterns import axes
from fxfuse.patterns.axes import Columns, columns_of, runs_of
from fxfuse.patterns.norms import NORM_KINDS
from fxfuse.patterns.record import (
    AddNorm,
    DecodeAttention,
    Norm,
    Pair,
    Record,
    Rotation,
    Stream,
)
from fxfuse.reference_store import unrounded, write_

# An operand that a call may lack.
Maybe = Tensor | None
# start, step and values of some of a row's channels: row[..., start + step * i] = values[..., i].
Part = tuple[int, int, Tensor]


def norm_rope(
    q: Tensor, k: Maybe,
    q_weight: Maybe, k_weight: Maybe, q_bias: Maybe, k_bias: Maybe,
    q_scale: Maybe, k_scale: Maybe, cos: Maybe, sin: Maybe, positions: Maybe,
    q_eps: float, k_eps: float, record: Record,
) -> tuple[Tensor, Maybe]:  # fmt: skip
    """q and k after their record: scale * row_scale * norm/rope(x), see `row`; None without k."""
    cos, sin, record = by_token(cos, sin, positions, record)
    q_row = row(q, record.q, q_weight, q_bias, q_scale, cos, sin, q_eps)
    if k is None or record.k is None:
        return q_row, None
    return q_row, row(k, record.k, k_weight, k_bias, k_scale, cos, sin, k_eps)


def norm_rope_store_(
    q: Tensor, k: Maybe, v: Maybe,
    q_weight: Maybe, k_weight: Maybe, q_bias: Maybe, k_bias: Maybe,
    q_scale: Maybe, k_scale: Maybe, cos: Maybe, sin: Maybe, positions: Maybe,
    slots: Tensor, offsets: Maybe, k_cache: Tensor, v_cache: Maybe,
    k_cache_scale: Maybe, v_cache_scale: Maybe,
    q_eps: float, k_eps: float, record: Record,
) -> tuple[Tensor, Maybe]:  # fmt: skip
    """As `norm_rope`; then k's rows into k_cache at its layout's indices, v's into v_cache. A norm
    of v has no weight, and k's eps.
    """
    cos, sin, record = by_token(cos, sin, positions, record)
    store = record.store
    assert store is not None
    at = (slots, offsets)
    q_row = row(q, record.q, q_weight, q_bias, q_scale, cos, sin, q_eps)
    k_row = None
    if k is not None and record.k is not None:
        kept, stored = record.k, unrounded(record.k, store.k)
        parts = row_parts(k, stored, k_weight, k_bias, k_scale, cos, sin, k_eps)
        if kept.keep:
            k_row = assembled(parts, kept.channels, kept.heads_first).to(dtype_of(kept))
            parts = parts if stored != kept else [(0, 1, k_row)]
        if "e" in store.k.axes:
            parts = [(0, 1, assembled(parts, kept.channels))]
        write_(k_cache, store.k, store, at, k_cache_scale, parts)
    if v is not None and v_cache is not None and record.v is not None:
        parts = row_parts(v, unrounded(record.v, store.v), None, None, None, cos, sin, k_eps)
        if "e" in store.v.axes:
            parts = [(0, 1, assembled(parts, record.v.channels))]
        write_(v_cache, store.v, store, at, v_cache_scale, parts)
    return q_row, k_row


def projected(x: Tensor, weight: Maybe, bias: Maybe) -> Maybe:
    """x Wᵀ + b as [B, T, H, D], of x [B, T, hidden], W [H, D, hidden] and b [H, D]."""
    if weight is None:
        return None
    rows = None if bias is None else bias.flatten()
    heads: Tensor = linear(x, weight.flatten(0, 1), rows)
    return heads.view(*x.shape[:2], *weight.shape[:2])


def project_norm_rope_store_(
    x: Tensor, residual: Maybe, x_weight: Maybe, x_eps: float,
    q_proj: Tensor, k_proj: Maybe, v_proj: Maybe,
    q_proj_bias: Maybe, k_proj_bias: Maybe, v_proj_bias: Maybe,
    *behind: Any,
) -> tuple[Tensor, Maybe, Maybe]:  # fmt: skip
    """`norm_rope_store_` of the products of x with the weights, where x may be the norm of
    x + residual; then that sum, None where it is not kept.
    """
    record: Record = behind[-1]
    total = None
    if record.front is not None:
        total, x = add_rms_norm(x, residual, None, x_weight, x_eps, record.front)
        total = total if record.front.keep_sum else None
    q = projected(x, q_proj, q_proj_bias)
    k, v = projected(x, k_proj, k_proj_bias), projected(x, v_proj, v_proj_bias)
    assert q is not None
    return *norm_rope_store_(q, k, v, *behind), total


def by_token(
    cos: Maybe, sin: Maybe, positions: Maybe, record: Record
) -> tuple[Maybe, Maybe, Record]:
    """cos and sin [B|1, T|1, R] by token, taken by position where there are positions, and the
    record over these.
    """
    cos = looked_up(cos, positions, columns_of(record, "cos"))
    sin = looked_up(sin, positions, columns_of(record, "sin"))
    return cos, sin, axes.by_token(record)


def looked_up(table: Maybe, positions: Maybe, columns: Columns | None = None) -> Maybe:
    """A table's rows by position: y[b, t, c] = table[0, positions[b, t], c]; of columns by axes
    y[b, t, c] = table[0, positions[axes[c], b, t], first + c]; the table itself without positions.

    Shapes: table [1, N, R]; positions [B|1, T|1] or [axes, B|1, T|1]; y [B|1, T|1, R or columns].
    """
    if table is None or positions is None:
        return table
    index: list[Tensor] = [positions]
    if columns is not None:
        channels = torch.arange(len(columns.axes), device=positions.device)
        index = [by_column(positions, channels, columns.axes), channels + columns.first]
    rows: Tensor = torch.ops.aten.index.Tensor(table[0], index)
    return rows


def by_column(positions: Tensor, columns: Tensor, by: tuple[int, ...]) -> Tensor:
    """y[b, t, c] = positions[by[c], b, t]. Shapes: positions [axes, B, T], columns [R], the numbers
    of the columns; y [B, T, R].
    """
    base, *runs = runs_of(by)
    y = positions[base.axis].unsqueeze(-1).expand(-1, -1, len(by))
    for run in runs:
        at = columns - run.first
        own = (at >= 0) & (at < run.step * run.count) & (at % run.step == 0)
        y = torch.where(own, positions[run.axis].unsqueeze(-1), y)
    return y


def row(
    x: Tensor, stream: Stream, weight: Maybe, bias: Maybe,
    scale: Maybe, cos: Maybe, sin: Maybe, eps: float,
) -> Tensor:  # fmt: skip
    """One stream: scale * row_scale * rope(norm(x)), or with the norm after the rotation.

    Shapes: x [B, T, H, D]; weight, bias [D] or [H, D]; scale [B|1, T|1, H|1];
        cos, sin [B|1, T|1, Rt].
    Rounding: float64 throughout for a float64 x, else float32; once, at the end, to stream.dtype.
    """
    parts = row_parts(x, stream, weight, bias, scale, cos, sin, eps)
    return assembled(parts, stream.channels, stream.heads_first)


def row_parts(
    x: Tensor, stream: Stream, weight: Maybe, bias: Maybe,
    scale: Maybe, cos: Maybe, sin: Maybe, eps: float,
) -> list[Part]:  # fmt: skip
    """`row` in parts that tile its channels, each rounded, so that loops write each part once."""
    norm = stream.norm
    y = x.to(working_dtype(x))
    if norm and norm.when == "before":
        y = normalise(y, norm, weight, bias, eps)
    parts = rotated(y, stream, cos, sin)
    if norm and norm.when == "after":
        y = normalise(assembled(parts, stream.channels), norm, weight, bias, eps)
        parts = [(0, 1, y)]
    return [(start, step, scaled(y, stream, scale)) for start, step, y in parts]


def normalise(x: Tensor, norm: Norm, weight: Maybe, bias: Maybe, eps: float) -> Tensor:
    """x * factor(mean(x * x), eps) * (weight + offset) + bias; no statistic where it is given."""
    if norm.over == "head":
        kind = NORM_KINDS[norm.kind]
        x = x - x.mean(-1, keepdim=True) if kind.centred else x
        x = x * kind.factor((x * x).mean(-1, keepdim=True), eps)
    if norm.has_weight and weight is not None:
        x = x * offset_weight(weight.to(x.dtype), norm)
    if norm.has_bias and bias is not None:
        x = x + bias.to(x.dtype)
    return x


def offset_weight(weight: Tensor, norm: Norm) -> Tensor:
    return weight + norm.weight_offset if norm.weight_offset else weight


def scaled(y: Tensor, stream: Stream, scale: Maybe) -> Tensor:
    """y * row_scale * scale, rounded to the stream's dtype."""
    if stream.has_scale and scale is not None:
        y = y * scale.to(y.dtype).unsqueeze(-1)
    if stream.scale != 1.0:
        y = y * stream.scale
    return y.to(dtype_of(stream))


def dtype_of(stream: Stream) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, stream.dtype)
    return dtype


def rotated(x: Tensor, stream: Stream, cos: Maybe, sin: Maybe) -> list[Part]:
    """The record's rotation and passes, see `Rotation` and `Pass`. Shapes: x [B, T, H, D]."""
    parts: list[Part] = [(p.y_start, 1, take(x, p.x_start, 1, p.length)) for p in stream.passes]
    turn = stream.rotation
    if turn is not None:
        assert cos is not None and sin is not None
        first, second = turned(x, turn, cos.to(x.dtype), sin.to(x.dtype))
        if turn.y.step == 2 and turn.y.second == turn.y.first + 1:
            parts.append((turn.y.first, 1, torch.stack((first, second), -1).flatten(-2)))
        else:
            parts += [(turn.y.first, turn.y.step, first), (turn.y.second, turn.y.step, second)]
    return parts


def turned(x: Tensor, turn: Rotation, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both members of each pair, rotated. Shapes: x [B, T, H, D] -> two of [B, T, H, pairs]."""
    if not turn.by_head:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    x_first, x_second = members(x, turn.x, turn.pairs)
    cos_first, cos_second = members(cos, turn.cos, turn.pairs)
    sin_first, sin_second = members(sin, turn.sin, turn.pairs)
    first = plus(x_first * cos_first, x_second * sin_first, turn.signs[0])
    second = plus(x_second * cos_second, x_first * sin_second, turn.signs[1])
    return first, second


def plus(a: Tensor, b: Tensor, sign: int) -> Tensor:
    return a + b if sign > 0 else a - b


def members(x: Tensor, pair: Pair, pairs: int) -> tuple[Tensor, Tensor]:
    return take(x, pair.first, pair.step, pairs), take(x, pair.second, pair.step, pairs)


def take(x: Tensor, start: int, step: int, length: int) -> Tensor:
    """x[..., start + step * i] for i in range(length), as a view."""
    return x[..., start : start + step * (length - 1) + 1 : step]


def assembled(parts: list[Part], channels: int, heads_first: bool = False) -> Tensor:
    """One row of parts that tile its channels; joined in the memory order of the result."""
    # cat is what Inductor's C++ loops vectorise; strided parts in odd places need the scatter.
    if all(step == 1 or part.shape[-1] == 1 for _, step, part in parts):
        ordered = [part for _, _, part in sorted(parts, key=lambda p: p[0])]
        if len(ordered) == 1:
            return ordered[0]
        if heads_first:
            return torch.cat([part.transpose(1, 2) for part in ordered], -1).transpose(1, 2)
        return torch.cat(ordered, -1)
    one = parts[0][2]
    y = one.new_zeros((*one.shape[:-1], channels))
    for start, step, part in parts:
        end = start + step * (part.shape[-1] - 1) + 1
        y = torch.slice_scatter(y, part, -1, start, end, step)
    return y


def add_rms_norm(
    x: Tensor, residual: Maybe, second: Maybe, weight: Maybe,
    eps: float, record: AddNorm,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sum = x + residual + second; y = sum * rsqrt(mean(sum * sum) + eps) * (weight + offset).

    Shapes: all [..., D], weight [D]. Rounding: each sum as torch's addition rounds it; y once.
    """
    for addend in (residual, second):
        x = x if addend is None else x + addend
    y = x.to(working_dtype(x))
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * offset_weight(weight.to(y.dtype), record.norm)
    return x, y.to(getattr(torch, record.dtype))


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Maybe,
    scale: float | None,
    record: DecodeAttention,
) -> Tensor:
    """out = softmax(q kᵀ · scale + mask) v, the query heads of one head of k as rows of a product.

    Shapes: as `fxfuse.attention.decode_attention`; a row that attends nothing is 0.
    """
    batch, heads, groups = q.shape[0], record.heads, record.kv_heads
    wide = working_dtype(q)
    rows = q.to(wide).reshape(batch, groups, heads // groups, record.channels)
    scale = record.channels**-0.5 if scale is None else scale
    scores = rows @ k.to(wide).transpose(2, 3) * scale  # [B, G, H / G, S]
    if mask is not None:
        mask = mask.expand(batch, heads, 1, record.slots).reshape(scores.shape)
        if mask.dtype == torch.bool:
            scores = torch.where(mask, scores, float("-inf"))
        else:
            scores = scores + mask
    most = scores.amax(-1, keepdim=True)
    p = torch.exp(scores - torch.where(most == float("-inf"), 0.0, most))
    total = p.sum(-1, keepdim=True)
    out = p @ v.to(wide) / torch.where(total == 0.0, 1.0, total)
    return out.reshape(batch, heads, 1, record.v_channels).to(q.dtype)


def working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def in_float64(record: Record) -> Record:
    """The same record with float64 results: what a proof on float64 inputs compares with."""

    def widened(stream: Stream | None) -> Stream | None:
        return stream and dataclasses.replace(stream, dtype="float64")

    q = dataclasses.replace(record.q, dtype="float64")
    return dataclasses.replace(record, q=q, k=widened(record.k), v=widened(record.v))
