"""The op fxfuse::project_norm_rope_store_: q, k and v as products of one x with their weights, and
then what norm_rope_store_ does with them. x may be the norm of a sum, which the op makes then.

In comes what a rewritten graph hands over; out come q and k as norm_rope_store_ returns them, and
the sum. `fxfuse.schemas` defines the op.
"""

from typing import Any

import torch
from torch import Tensor

from fxfuse import ops
from fxfuse.patterns.record import Record
from fxfuse.reference import projected


def project_norm_rope_store_(
    x: Tensor, residual: Tensor | None, x_weight: Tensor | None, x_eps: float,
    q_proj: Tensor, k_proj: Tensor | None, v_proj: Tensor | None,
    q_proj_bias: Tensor | None, k_proj_bias: Tensor | None, v_proj_bias: Tensor | None,
    *behind: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `fxfuse.ops.norm_rope_store_` of q = x Wᵀ + b, and so k and v; `behind` are its arguments
    from q_weight on. Where the record has a front, x is first made the y of
    `fxfuse.add_norm.add_rms_norm` of x + residual with x_weight and x_eps.

    Shapes: x, residual [B, T, hidden]; x_weight [hidden]; q_proj [H, D, hidden], its bias [H, D];
        k_proj [G, D, hidden], v_proj [G, Dv, hidden]; the rest, q and k as there; the sum as x, [0]
        where it is not kept.
    Layout: any strides; a weight's last axis is contiguous where a kernel takes it.
    Dtypes: x, residual and the weights of the products of one floating dtype; x_weight any.
    Rounding: the sum to its dtype; the normed x (of one token), q, k and v are not rounded where a
        kernel makes them; in eager code, and where the products are the compiler's own, to x's
        dtype.
    Mutates: k_cache and v_cache, at the slots alone. Not differentiable.
    Errors: ValueError where shapes and record disagree.
    Source: the projections of an attention layer, as torch.nn.functional.linear has them.
    """
    biases = (q_proj_bias, k_proj_bias, v_proj_bias)
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.fxfuse.project_norm_rope_store_(
        x, residual, x_weight, x_eps, q_proj, k_proj, v_proj, *biases, *behind
    )
    return result


def _check(record: Record, x: Tensor, residual: Tensor | None, *weights: Tensor | None) -> None:
    if (record.front is None) != (residual is None):
        got, wanted = ("none", "one") if residual is None else ("one", "none")
        raise ValueError(
            f"fxfuse: residual: got {got}, wanted {wanted}, as the record has it; "
            "hand over the two tensors that its front adds up, or write a record without one"
        )
    for name, w in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
        if w is not None and (x.dim() != 3 or w.dim() != 3 or w.shape[-1] != x.shape[-1]):
            raise ValueError(
                f"fxfuse: {name}: got shape {tuple(w.shape)} for x {tuple(x.shape)}, wanted "
                "[heads, channels, hidden] for [B, T, hidden]; view the weight by heads first"
            )


def run_project_norm_rope_store_(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (residual, x_weight, x_eps), weights, biases, behind = rest[:3], rest[3:6], rest[6:9], rest[9:]
    record = ops.read_record(rest[-1])
    _check(record, x, residual, *weights)
    total = x.new_empty((0,))
    if (front := record.front) is not None:
        add = torch.ops.fxfuse.add_rms_norm
        total, x = add(x, residual, None, x_weight, x_eps, front.to_text())
    made = [projected(x, w, b) for w, b in zip(weights, biases, strict=True)]
    q, k = torch.ops.fxfuse.norm_rope_store_(*made, *behind)
    return q, k, total


def fake_project_norm_rope_store_(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    record, weights = ops.read_record(rest[-1]), rest[3:6]
    _check(record, x, rest[0], *weights)
    q, k = (None if w is None else x.new_empty((*x.shape[:2], *w.shape[:2])) for w in weights[:2])
    assert q is not None
    kept = record.front is not None and record.front.keep_sum
    total = x.new_empty(x.shape if kept else (0,))
    return *ops.empty_results(q, k, record), total
