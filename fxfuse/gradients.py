"""Gradients of fxfuse::norm_rope, written out: what the op saves and how it goes back.

In come the raw inputs and the gradients of both results; out come the gradients of q, k,
weights, biases and row scales. Statistics and rotations are recomputed from the raw rows alone.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.patterns.norms import NORM_KINDS
from fxfuse.patterns.record import Norm, Pair, Pass, Record, Rotation, Stream

# The op's arguments that are tensors, in order; then q_eps, k_eps, record.
TENSORS = (
    *("q", "k", "q_weight", "k_weight", "q_bias", "k_bias", "q_scale", "k_scale"),
    *("cos", "sin", "positions"),
)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tables = inputs[TENSORS.index("cos") : TENSORS.index("positions")]
    if any(table is not None and table.requires_grad for table in tables):
        raise NotImplementedError(
            "fxfuse::norm_rope: cos or sin requires grad, and the op gives tables no gradient; "
            "detach the tables, or leave this site unfused"
        )
    ctx.save_for_backward(*inputs[: len(TENSORS)])
    ctx.eps = inputs[len(TENSORS) : -1]
    ctx.record = Record.from_text(inputs[-1])


def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = dict(zip(TENSORS, ctx.saved_tensors, strict=True))
    cos, sin, record = reference.by_token(
        saved["cos"], saved["sin"], saved["positions"], ctx.record
    )
    grads: dict[str, Tensor | None] = {}
    for name, grad, stream, eps in (
        ("q", q_grad, record.q, ctx.eps[0]),
        ("k", k_grad, record.k, ctx.eps[1]),
    ):
        x = saved[name]
        if x is None or stream is None or not stream.keep:
            continue
        names = (name, f"{name}_weight", f"{name}_bias", f"{name}_scale")
        weight, bias, scale = (saved[n] for n in names[1:])
        found = row(grad, x, stream, weight, bias, scale, (cos, sin), eps)
        grads |= dict(zip(names, found, strict=True))
    return *(grads.get(name) for name in TENSORS), None, None, None


def row(
    grad: Tensor,
    x: Tensor,
    stream: Stream,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    tables: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of one stream's x, weight, bias and row scale; the stages of `reference.row` in
    reverse.

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
        y = reference.row(wide, plain, weight, bias, None, *tables, eps)
        scale_grad = _summed((g * y).sum(-1), scale)
        g = g * scale.to(work).unsqueeze(-1)
    weight_grad = bias_grad = None
    if norm is not None and norm.when == "after":
        turned = rotated(wide, stream, *tables)
        bias_grad = _bias_grad(g, bias)
        g, weight_grad = _norm_backward(g, turned, norm, weight, eps)
    g = rotated(g, back, *tables)
    if norm is not None and norm.when == "before":
        bias_grad = _bias_grad(g, bias)
        g, weight_grad = _norm_backward(g, wide, norm, weight, eps)
    return g.to(x.dtype), weight_grad, bias_grad, scale_grad


def _bias_grad(g: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _summed(g, bias)


def rotated(x: Tensor, stream: Stream, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return reference.assembled(reference.rotated(x, stream, cos, sin), stream.channels)


def _norm_backward(
    g: Tensor, x: Tensor, norm: Norm, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Through y = u * w, u = x * r, r = factor(mean(x²)): dx = r * du + 2 * r' * x * mean(du * x);
    where x is centred first, dx loses its mean.
    """
    if norm.over == "given":
        return _weight_backward(g, x, norm, weight)
    kind = NORM_KINDS[norm.kind]
    if kind.slope is None:
        raise NotImplementedError(f"fxfuse::norm_rope: no gradient for the norm kind {norm.kind}")
    x = x - x.mean(-1, keepdim=True) if kind.centred else x
    mean = (x * x).mean(-1, keepdim=True)
    r = kind.factor(mean, eps)
    g, weight_grad = _weight_backward(g, x * r, norm, weight)
    g = r * g + 2 * kind.slope(mean, eps) * x * (g * x).mean(-1, keepdim=True)
    return g - g.mean(-1, keepdim=True) if kind.centred else g, weight_grad


def _weight_backward(
    g: Tensor, u: Tensor, norm: Norm, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Through y = u * w."""
    if not norm.has_weight or weight is None:
        return g, None
    return g * reference.offset_weight(weight.to(g.dtype), norm), _summed(g * u, weight)


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
