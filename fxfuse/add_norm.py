"""The op fxfuse::add_rms_norm: rows added up and normed over their whole width; as a function, and
as what it runs.

In comes what a rewritten graph hands over: the addends, a weight and the record as text. Out come
the sum and the normed rows. `fxfuse.schemas` defines the op.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fxfuse import ops, reference
from fxfuse.patterns.record import AddNorm


def add_rms_norm(
    x: Tensor, residual: Tensor | None, second: Tensor | None,
    weight: Tensor | None, eps: float, record: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum and RMSNorm: s = x + residual + second, y = s * rsqrt(mean(s²) + eps) * (w + offset).

    Shapes: addends [..., D], all alike; weight [D]; results as x, the sum [0] where not kept.
    Layout: inputs any strides; results dense.
    Dtypes: any floating input; the sum as torch's addition gives it, y as the record says.
    Rounding: each sum to its dtype, y from the rounded sum in float32 (float64 for float64 sums),
        rounded once.
    Mutates: nothing. Differentiable in addends and weight.
    Errors: ValueError where shapes and record disagree.
    Source: RMSNorm arXiv:1910.07467, with the residual stream of a decoder layer in front.
    """
    result: tuple[Tensor, Tensor] = torch.ops.fxfuse.add_rms_norm(
        x, residual, second, weight, eps, record
    )
    return result


@functools.cache
def read_record(text: str) -> AddNorm:
    return AddNorm.from_text(text)


def _checked(record: AddNorm, x: Tensor, *addends: Tensor | None) -> list[Tensor]:
    """The addends that are there."""
    found = [x, *(a for a in addends if a is not None)]
    shapes = [tuple(a.shape) for a in found]
    if len(found) != record.addends:
        raise ValueError(f"fxfuse: add_rms_norm: got {len(found)} addends, wanted {record.addends}")
    if any(shape != shapes[0] for shape in shapes) or shapes[0][-1] != record.channels:
        raise ValueError(
            f"fxfuse: add_rms_norm: got addends of shapes {shapes}, wanted all of one shape "
            f"[..., {record.channels}]; expand the residual first"
        )
    return found


def empty_results(found: list[Tensor], record: AddNorm) -> tuple[Tensor, Tensor]:
    """Dense memory for both results; also the op's fake implementation."""
    x = found[0]
    dtype = functools.reduce(torch.promote_types, [a.dtype for a in found])
    total = x.new_empty(x.shape, dtype=dtype) if record.keep_sum else x.new_empty((0,))
    return total, x.new_empty(x.shape, dtype=getattr(torch, record.dtype))


def run_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    second: Tensor | None,
    weight: Tensor | None,
    eps: float,
    text: str,
) -> tuple[Tensor, Tensor]:
    record = read_record(text)
    found = _checked(record, x, residual, second)
    args = (x, residual, second, weight, eps, text)
    launched: tuple[Tensor, Tensor] | None = ops.launched("add_rms_norm", x, args, record)
    if launched is not None:
        return launched
    # Copied, so that strides are exactly the contract's and no result aliases an input.
    results = empty_results(found, record)
    total, normed = reference.add_rms_norm(x, residual, second, weight, eps, record)
    if record.keep_sum:
        results[0].copy_(total)
    results[1].copy_(normed)
    return results


def fake_add_rms_norm(
    x: Tensor, residual: Tensor | None, second: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    record = read_record(rest[-1])
    return empty_results(_checked(record, x, residual, second), record)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, second, weight, ctx.eps, text = inputs
    ctx.record = read_record(text)
    ctx.dtypes = [None if a is None else a.dtype for a in (x, residual, second)]
    addends = (output[0], None, None) if ctx.record.keep_sum else (x, residual, second)
    ctx.save_for_backward(*addends, weight)


def backward(ctx: Any, sum_grad: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With u = s * r: ds = r * (du - u * mean(du * u)), and what the sum's readers send back."""
    *addends, weight = ctx.saved_tensors
    record: AddNorm = ctx.record
    x = functools.reduce(torch.add, [a for a in addends if a is not None])
    wide = x.to(reference.working_dtype(x))
    r = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + ctx.eps)
    u, g = wide * r, grad.to(wide.dtype)
    weight_grad = None
    if weight is not None:
        weight_grad = (g * u).sum_to_size(weight.shape).to(weight.dtype)
        g = g * reference.offset_weight(weight.to(g.dtype), record.norm)
    total = r * (g - u * (g * u).mean(-1, keepdim=True))
    if record.keep_sum:
        total = total + sum_grad
    grads = [None if dtype is None else total.to(dtype) for dtype in ctx.dtypes]
    return (*grads, weight_grad, None, None)
