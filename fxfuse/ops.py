"""The two fused ops, fxfuse::norm_rope and fxfuse::norm_rope_store_, as functions and as what they
run; and, of `fxfuse.by_hand`, the functions that call them without a record.

In comes what a rewritten graph hands over: q, k, v as views of their projections, weights, tables,
slots, caches and the record as text. Out come q and k, in the memory order the record names.
`fxfuse.schemas` defines the ops; compiled graphs get their kernels from `fxfuse.lowering`, eager
code Triton's on a GPU where it takes the call, and else the reference.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.by_hand import add_rms_norm, qk_norm, qk_norm_rope, qk_norm_rope_store_, rope
from fxfuse.patterns.axes import by_token
from fxfuse.patterns.record import AddNorm, DecodeAttention, Record, Stream

__all__ = [
    "add_rms_norm",
    "norm_rope",
    "norm_rope_store_",
    "qk_norm",
    "qk_norm_rope",
    "qk_norm_rope_store_",
    "rope",
]

# Where the positions stand behind q, k (and v) in both.
POSITIONS = 8


def norm_rope(
    q: Tensor, k: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None,
    k_bias: Tensor | None, q_scale: Tensor | None, k_scale: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, positions: Tensor | None,
    q_eps: float, k_eps: float, record: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm and RoPE of q and k: y = scale * row_scale * rope(x * rsqrt(mean(x²) + eps) * w + b).

    Shapes: q [B, T, H, D], k [B, T, G, D]; weights and biases [D] or [H, D];
        scales [B|1, T|1, H|1];
        cos, sin [B|1, T|1, Rt], or [B|1, T|1, H|1, Rt] where the record's rotation is by head;
        with positions [B|1, T|1] (integers, negative ones from the end) they are [1, N, Rt], and
        token t of batch row b turns by row positions[b, t], or, where the record's rotation has
        an axis for each pair, pair i by row positions[axes[i], b, t] of [axes, B|1, T|1];
        results as q and k, [0] where k is absent or not kept.
    Layout: inputs any strides; results dense, [B, H, T, D] in memory where heads_first.
    Dtypes: any floating input; results as the record says.
    Rounding: float32 (float64 for float64 inputs) inside, one rounding at the end.
    Mutates: nothing. Differentiable in q, k, weights, biases and scales.
    Errors: ValueError where shapes and record disagree, NotImplementedError for table gradients.
    Source: RMSNorm arXiv:1910.07467, LayerNorm arXiv:1607.06450, RoPE arXiv:2104.09864; in float32
        as Inductor fuses them.
    """
    result: tuple[Tensor, Tensor] = torch.ops.fxfuse.norm_rope(
        q, k, q_weight, k_weight, q_bias, k_bias, q_scale, k_scale, cos, sin, positions,
        q_eps, k_eps, record,
    )  # fmt: skip
    return result


def norm_rope_store_(
    q: Tensor, k: Tensor | None, v: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None,
    k_bias: Tensor | None, q_scale: Tensor | None, k_scale: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, positions: Tensor | None,
    slots: Tensor, offsets: Tensor | None, k_cache: Tensor, v_cache: Tensor | None,
    k_cache_scale: Tensor | None, v_cache_scale: Tensor | None,
    q_eps: float, k_eps: float, record: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `norm_rope`, and the rows of k and v written into caches, say at k_cache[b, g, slots[t]].

    Shapes: as norm_rope; v [B, T, G, Dv]; slots and offsets [B | 1, T] of an integer dtype; caches
        as the axes of their layouts in the record's store say; their scales [B | 1, T | 1, G | 1].
    Layout: any strides everywhere; results as norm_rope.
    Dtypes: as norm_rope; a cache has its rows' dtype, the format its layout's cast names, or
        uint8 for such a format's bits.
    Rounding: as norm_rope; v is copied, or normed by its head without a weight and with k_eps;
        where there is a cast, row (/ or *) scale is rounded once.
    Mutates: k_cache and v_cache, at the slots alone. Not differentiable.
    Errors: ValueError where shapes and record disagree.
    Source: transformers' StaticCache (index_copy_), index_put_ into paged caches, paged attention's
        split layouts (vLLM, aiter).
    """
    result: tuple[Tensor, Tensor] = torch.ops.fxfuse.norm_rope_store_(
        q, k, v, q_weight, k_weight, q_bias, k_bias, q_scale, k_scale, cos, sin, positions,
        slots, offsets, k_cache, v_cache, k_cache_scale, v_cache_scale, q_eps, k_eps, record,
    )  # fmt: skip
    return result


def dense(x: Tensor, stream: Stream) -> Tensor:
    """Uninitialised memory for a result: shaped as x, in the memory order of the record."""
    b, t, h, d = x.shape
    dtype = getattr(torch, stream.dtype)
    if stream.heads_first:
        return x.new_empty((b, h, t, d), dtype=dtype).transpose(1, 2)
    return x.new_empty((b, t, h, d), dtype=dtype)


def empty_results(q: Tensor, k: Tensor | None, record: Record) -> tuple[Tensor, Tensor]:
    """Results of the right shapes, strides and dtypes; also the fake implementation of both ops."""
    if k is None or record.k is None or not record.k.keep:
        return dense(q, record.q), q.new_empty((0,))
    return dense(q, record.q), dense(k, record.k)


@functools.cache
def read_record(text: str) -> Record:
    """The record of an op call, refused where its channels do not tile a row, where pairs of
    different axes share a column of a table, or where v's norm has a weight.
    """
    record = Record.from_text(text)
    for name, stream in (("q", record.q), ("k", record.k), ("v", record.v)):
        if stream is not None:
            _check_tiling(name, stream)
    norm = record.v.norm if record.v else None
    if norm and (norm.over != "head" or norm.has_weight or norm.has_bias):
        raise ValueError(
            "fxfuse: record of v: a norm with a weight, a bias or a factor by row, wanted one by "
            "its head alone or none; this is a bug in the planner that wrote the record"
        )
    by_token(record)
    return record


def _check_tiling(name: str, stream: Stream) -> None:
    whole = list(range(stream.channels))
    turn = stream.rotation
    for side in ("x", "y"):
        covered = [getattr(p, f"{side}_start") + i for p in stream.passes for i in range(p.length)]
        if turn is not None:
            pair = getattr(turn, side)
            starts = (pair.first, pair.second)
            covered += [s + pair.step * i for s in starts for i in range(turn.pairs)]
        if sorted(covered) != whole:
            raise ValueError(
                f"fxfuse: record of {name}: its pairs and passes cover {side} channels "
                f"{sorted(covered)}, wanted each of range({stream.channels}) once; "
                "this is a bug in the planner that wrote the record"
            )


def _check_row(name: str, x: Tensor | None, stream: Stream | None) -> None:
    if x is None or stream is None:
        return
    if x.dim() != 4 or x.shape[-1] != stream.channels:
        raise ValueError(
            f"fxfuse: {name}: got shape {tuple(x.shape)}, wanted [B, T, heads, "
            f"{stream.channels}]; view the projection's output by heads first"
        )


def _check_tokens(q: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"fxfuse: {name}: got {list(x.shape[:2])} batch rows and tokens, wanted q's "
                f"{list(q.shape[:2])}; call the op once for each where they differ"
            )


def _check_positions(positions: Tensor | None, record: Record) -> None:
    turn = record.q.rotation
    axes = turn.axes if turn is not None else ()
    got = None if positions is None else tuple(positions.shape)
    if axes and (got is None or len(got) != 3 or got[0] <= max(axes)):
        wanted = f"[axes, B|1, T|1] with at least {max(axes) + 1} axes, as the record's pairs have"
    elif not axes and got is not None and len(got) != 2:
        wanted = "[B|1, T|1], one position a token, as the record's pairs have no axes"
    else:
        return
    raise ValueError(
        f"fxfuse: positions: got shape {got}, wanted {wanted}; "
        "hand over the positions that the record was written for"
    )


def run_norm_rope(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    record = read_record(rest[-1])
    _check_row("q", q, record.q)
    _check_row("k", k, record.k)
    _check_tokens(q, k=k)
    _check_positions(rest[POSITIONS], record)
    results: tuple[Tensor, Tensor] | None = launched("norm_rope", q, (q, k, *rest), record)
    if results is not None:
        return results
    return _filled(q, k, reference.norm_rope(*(q, k, *rest[:-1], record)), record)


def run_norm_rope_store_(
    q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    record = read_record(rest[-1])
    _check_row("q", q, record.q)
    _check_row("k", k, record.k)
    _check_row("v", v, record.v)
    _check_tokens(q, k=k, v=v)
    _check_positions(rest[POSITIONS], record)
    if 0 in q.shape[:2]:
        return empty_results(q, k, record)
    given = (q, k, v, *rest)
    results: tuple[Tensor, Tensor] | None = launched("norm_rope_store_", q, given, record)
    if results is not None:
        return results
    return _filled(q, k, reference.norm_rope_store_(*(q, k, v, *rest[:-1], record)), record)


def launched(
    name: str, x: Tensor, args: tuple[Any, ...], record: Record | AddNorm | DecodeAttention
) -> Any:
    """Results by a kernel, for an op called in eager code on a GPU; None where none takes it."""
    if not x.is_cuda:
        return None
    from fxfuse.lowering import eager

    return eager.launched(name, args, record)


def _filled(
    q: Tensor, k: Tensor | None, rows: tuple[Tensor, Tensor | None], record: Record
) -> tuple[Tensor, Tensor]:
    # Copied, so that strides are exactly the contract's and no result aliases an input.
    q_out, k_out = empty_results(q, k, record)
    q_out.copy_(rows[0])
    if k_out.dim() == 4 and rows[1] is not None:
        k_out.copy_(rows[1])
    return q_out, k_out


def fake_norm_rope(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    record = read_record(rest[-1])
    _check_row("q", q, record.q)
    _check_row("k", k, record.k)
    _check_positions(rest[POSITIONS], record)
    return empty_results(q, k, record)


def fake_norm_rope_store_(
    q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    _check_row("v", v, read_record(rest[-1]).v)
    return fake_norm_rope(q, k, *rest)
