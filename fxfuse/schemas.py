"""The ops of torch.ops.fxfuse, by their schemas. Importing this module defines them, which is all
that `import fxfuse` does; what an op runs is imported when the op is called.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

NORM_ROPE = (
    "norm_rope(Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, "
    "Tensor? k_bias, Tensor? q_scale, Tensor? k_scale, Tensor? cos, Tensor? sin, "
    "Tensor? positions, float q_eps, float k_eps, str record) "
    "-> (Tensor, Tensor)"
)
NORM_ROPE_STORE_ = (
    "norm_rope_store_(Tensor q, Tensor? k, Tensor? v, Tensor? q_weight, Tensor? k_weight, "
    "Tensor? q_bias, Tensor? k_bias, Tensor? q_scale, Tensor? k_scale, Tensor? cos, Tensor? sin, "
    "Tensor? positions, Tensor slots, Tensor? offsets, Tensor(a!) k_cache, Tensor(b!)? v_cache, "
    "Tensor? k_cache_scale, Tensor? v_cache_scale, float q_eps, float k_eps, str record) "
    "-> (Tensor, Tensor)"
)
# q, k and v made of one x, or of the norm of x + residual; that sum is the third result.
PROJECT_NORM_ROPE_STORE_ = NORM_ROPE_STORE_.replace(
    "norm_rope_store_(Tensor q, Tensor? k, Tensor? v, ",
    "project_norm_rope_store_(Tensor x, Tensor? residual, Tensor? x_weight, float x_eps, "
    "Tensor q_proj, Tensor? k_proj, Tensor? v_proj, "
    "Tensor? q_proj_bias, Tensor? k_proj_bias, Tensor? v_proj_bias, ",
).replace("(Tensor, Tensor)", "(Tensor, Tensor, Tensor)")
ADD_RMS_NORM = (
    "add_rms_norm(Tensor x, Tensor? residual, Tensor? second, Tensor? weight, float eps, "
    "str record) -> (Tensor, Tensor)"
)
DECODE_ATTENTION = (
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, str record) "
    "-> Tensor"
)

# What functions called by hand are to torch: ops that it decomposes into those above.
_Q_K = (
    "Tensor q, Tensor? k, Tensor? cos, Tensor? sin, Tensor? positions, Tensor? q_weight, "
    "Tensor? k_weight, float q_eps, float k_eps, float weight_offset, bool normed, "
    "bool interleaved, int? rotary_dim, int[] axes, bool heads_first"
)
QK_NORM_ROPE_BY_HAND = f"qk_norm_rope_by_hand({_Q_K}) -> (Tensor, Tensor)"
QK_NORM_ROPE_STORE_BY_HAND_ = (
    f"qk_norm_rope_store_by_hand_({_Q_K}, Tensor? v, Tensor slots, Tensor? offsets, "
    "Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor? k_scale, Tensor? v_scale, str k_layout, "
    "str v_layout, str scale, str cache_format, float clamp, str negative, bool keep_k) "
    "-> (Tensor, Tensor)"
)
ADD_RMS_NORM_BY_HAND = (
    "add_rms_norm_by_hand(Tensor x, Tensor? residual, Tensor? second, Tensor? weight, float eps, "
    "float weight_offset, bool keep_sum) -> (Tensor, Tensor)"
)

# Each with the module of fxfuse that has its run_<op> and fake_<op>.
FUSED = (
    (NORM_ROPE, "ops"),
    (NORM_ROPE_STORE_, "ops"),
    (PROJECT_NORM_ROPE_STORE_, "projection"),
    (ADD_RMS_NORM, "add_norm"),
    (DECODE_ATTENTION, "attention"),
)
BY_HAND = (QK_NORM_ROPE_BY_HAND, QK_NORM_ROPE_STORE_BY_HAND_, ADD_RMS_NORM_BY_HAND)
# Those with gradients, and the module that has save and backward.
GRADIENTS = (("norm_rope", "gradients"), ("add_rms_norm", "add_norm"))

# Kept for the life of the process: a Library that is collected takes its ops with it.
library: Any = torch.library.Library("fxfuse", "FRAGMENT")  # type: ignore[no-untyped-call]


def _late(home: str, name: str) -> Callable[..., Any]:
    """A function of a module of fxfuse that is imported by the call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"fxfuse.{home}"), name)(*args, **kwargs)

    return call


def _define(schema: str, home: str, key: str) -> str:
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _late(home, f"run_{name}"), key)
    return name


for _schema, _home in FUSED:
    _name = _define(_schema, _home, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxfuse::{_name}", _late(_home, f"fake_{_name}"), lib=library)
for _name, _home in GRADIENTS:
    torch.library.register_autograd(
        f"fxfuse::{_name}",
        _late(_home, "backward"),
        setup_context=_late(_home, "save"),
        lib=library,
    )
for _schema in BY_HAND:
    _define(_schema, "by_hand", "CompositeImplicitAutograd")
