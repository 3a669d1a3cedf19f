"""The op fxfuse::project_norm_rope_store_: q, k and v as products of one x with their weights, and
then what norm_rope_store_ does with them.

In comes what a rewritten graph hands over; out come q and k as norm_rope_store_ returns them.
`fxfuse.schemas` defines the op.
"""

from typing import Any

import torch
from torch import Tensor

from fxfuse import ops
from fxfuse.reference import projected


def project_norm_rope_store_(
    x: Tensor,
    q_proj: Tensor,
    k_proj: Tensor | None,
    v_proj: Tensor | None,
    q_proj_bias: Tensor | None,
    k_proj_bias: Tensor | None,
    v_proj_bias: Tensor | None,
    *behind: Any,
) -> tuple[Tensor, Tensor]:
    """As `fxfuse.ops.norm_rope_store_` of q = x Wᵀ + b, and so k and v; `behind` are its arguments
    from q_weight on.

    Shapes: x [B, T, hidden]; q_proj [H, D, hidden], its bias [H, D]; k_proj [G, D, hidden], v_proj
        [G, Dv, hidden]; the rest, and the results, as there.
    Layout: any strides; a weight's last axis is contiguous where a kernel takes it.
    Dtypes: x and weights of one floating dtype.
    Rounding: q, k and v are not rounded where a kernel makes them; in eager code, and where the
        products are the compiler's own, to x's dtype.
    Mutates: k_cache and v_cache, at the slots alone. Not differentiable.
    Errors: ValueError where shapes and record disagree.
    Source: the projections of an attention layer, as torch.nn.functional.linear has them.
    """
    result: tuple[Tensor, Tensor] = torch.ops.fxfuse.project_norm_rope_store_(
        x, q_proj, k_proj, v_proj, q_proj_bias, k_proj_bias, v_proj_bias, *behind
    )
    return result


def _check(x: Tensor, *weights: Tensor | None) -> None:
    for name, w in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
        if w is not None and (x.dim() != 3 or w.dim() != 3 or w.shape[-1] != x.shape[-1]):
            raise ValueError(
                f"fxfuse: {name}: got shape {tuple(w.shape)} for x {tuple(x.shape)}, wanted "
                "[heads, channels, hidden] for [B, T, hidden]; view the weight by heads first"
            )


def run_project_norm_rope_store_(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weights, biases, behind = rest[:3], rest[3:6], rest[6:]
    _check(x, *weights)
    made = [projected(x, w, b) for w, b in zip(weights, biases, strict=True)]
    result: tuple[Tensor, Tensor] = torch.ops.fxfuse.norm_rope_store_(*made, *behind)
    return result


def fake_project_norm_rope_store_(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weights = rest[:3]
    _check(x, *weights)
    q, k = (None if w is None else x.new_empty((*x.shape[:2], *w.shape[:2])) for w in weights[:2])
    assert q is not None
    return ops.empty_results(q, k, ops.read_record(rest[-1]))
