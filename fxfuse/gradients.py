"""Gradients of fxfuse::norm_rope, written out: what the op saves and how it goes back.

In come the raw inputs and the gradients of both results; out come the gradients of q, k,
weights and row scales. Statistics and rotations are recomputed from the raw rows alone.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.patterns.record import Norm, Pair, Pass, Record, Rotation, Stream

# The op's arguments that are tensors, in order; then q_eps, k_eps, record.
TENSORS = ("q", "k", "q_weight", "k_weight", "q_scale", "k_scale", "cos", "sin")


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tables = inputs[TENSORS.index("cos") : len(TENSORS)]
    if any(table is not None and table.requires_grad for table in tables):
        raise NotImplementedError(
            "fxfuse::norm_rope: cos or sin requires grad, and the op gives tables no gradient; "
            "detach the tables, or leave this site unfused"
        )
    ctx.save_for_backward(*inputs[: len(TENSORS)])
    ctx.eps = inputs[len(TENSORS) : -1]
    ctx.record = Record.from_text(inputs[-1])


def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, q_scale, k_scale, cos, sin = ctx.saved_tensors
    record: Record = ctx.record
    tables = (cos, sin)
    dq, dq_weight, dq_scale = row(q_grad, q, record.q, q_weight, q_scale, tables, ctx.eps[0])
    dk = dk_weight = dk_scale = None
    if k is not None and record.k is not None and record.k.keep:
        dk, dk_weight, dk_scale = row(k_grad, k, record.k, k_weight, k_scale, tables, ctx.eps[1])
    return dq, dk, dq_weight, dk_weight, dq_scale, dk_scale, None, None, None, None, None


def row(
    grad: Tensor,
    x: Tensor,
    stream: Stream,
    weight: Tensor | None,
    scale: Tensor | None,
    tables: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of one stream's x, weight and row scale; the stages of `reference.row` backwards.

    Shapes: grad, x [B, T, H, D]. Rounding: as the op, float32 or float64 inside, one at the end.
    """
    work = reference.working_dtype(x)
    norm, wide, back = stream.norm, x.to(work), transposed(stream)
    g = grad.to(work)
    if stream.scale != 1.0:
        g = g * stream.scale
    scale_grad = None
    if stream.has_scale and scale is not None:
        plain = dataclasses.replace(stream, has_scale=False, scale=1.0, dtype=_name(work))
        y = reference.row(wide, plain, weight, None, *tables, eps)
        scale_grad = _summed((g * y).sum(-1), scale)
        g = g * scale.to(work).unsqueeze(-1)
    weight_grad = None
    if norm is not None and norm.when == "after":
        turned = rotated(wide, stream, *tables)
        g, weight_grad = _norm_backward(g, turned, norm, weight, eps)
    g = rotated(g, back, *tables)
    if norm is not None and norm.when == "before":
        g, weight_grad = _norm_backward(g, wide, norm, weight, eps)
    return g.to(x.dtype), weight_grad, scale_grad


def rotated(x: Tensor, stream: Stream, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return reference.assembled(reference.rotated(x, stream, cos, sin), stream.channels)


def _norm_backward(
    g: Tensor, x: Tensor, norm: Norm, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Through y = u * w, u = x * r, r = rsqrt(mean(x²) + eps): dx = r * (du - u * mean(du * u))."""
    given = norm.over == "given"
    r = None if given else torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    u = x if r is None else x * r
    weight_grad = None
    if norm.has_weight and weight is not None:
        weight_grad = _summed(g * u, weight)
        g = g * reference.offset_weight(weight.to(g.dtype), norm)
    if r is None:
        return g, weight_grad
    return r * (g - u * (g * u).mean(-1, keepdim=True)), weight_grad


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """grad summed over the axes that `like` was broadcast along, in its dtype."""
    return grad.sum_to_size(like.shape).to(like.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def transposed(stream: Stream) -> Stream:
    """The stream that takes gradients of y to gradients of x: its rotation is the transpose."""
    turn = stream.rotation
    if turn is not None:
        turn = Rotation(
            pairs=turn.pairs,
            x=turn.y,
            y=turn.x,
            cos=turn.cos,
            sin=Pair(turn.sin.second, turn.sin.first, turn.sin.step),
            signs=(turn.signs[1], turn.signs[0]),
            by_head=turn.by_head,
        )
    passes = tuple(Pass(p.y_start, p.x_start, p.length) for p in stream.passes)
    return dataclasses.replace(stream, rotation=turn, passes=passes)
