"""Kernels of other libraries for the same work, by package and recipe; used where installed.

Each entry takes a case and its module and gives a function of the case's arguments. Some work in
place, on q and k as a server would.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fxfuse.bench.chains import Chain, attended
from fxfuse.bench.recipes import ROPE_BASE, Case

Peer = Callable[[Case, Chain], Callable[..., Any]]
# positions, q, k, head size, table, NeoX or not; q and k in place.
Rotate = Callable[[Tensor, Tensor, Tensor, int, Tensor, bool], Any]
Norm = Callable[[Tensor, Tensor, float], Tensor]


def _norm_rope(norm: Norm, rotate: Rotate) -> Peer:
    """RMSNorm of q and of k, then the rotation of both: three launches."""

    def build(case: Case, chain: Chain) -> Callable[..., Any]:
        shape = case.shape

        def run(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            rows = (-1, shape.head_dim)
            q_out = norm(q.reshape(rows), chain.q_weight, shape.eps).view(len(q), -1)
            k_out = norm(k.reshape(rows), chain.k_weight, shape.eps).view(len(k), -1)
            rotate(positions, q_out, k_out, shape.head_dim, chain.table, shape.rotation == "neox")
            return q_out.view(q.shape), k_out.view(k.shape)

        return run

    return build


def _rope_store(rotate: Rotate) -> Peer:
    """The rotation of q and k in place, then torch's own store."""

    def build(case: Case, chain: Chain) -> Callable[..., Any]:
        d, neox = case.shape.head_dim, case.shape.rotation == "neox"

        def run(
            q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor,
            k_cache: Tensor, v_cache: Tensor,
        ) -> Tensor:  # fmt: skip
            flat = positions.view(-1)
            rotate(flat, q.view(len(flat), -1), k.view(len(flat), -1), d, chain.table, neox)
            k_cache[slots] = k.view(len(flat), -1, d)
            v_cache[slots] = v.view(len(flat), -1, d)
            return q

        return run

    return build


def _qk_norm(norm: Norm, gemma: Norm) -> Peer:
    """RMSNorm of q and of k, then torch's attention."""

    def build(case: Case, chain: Chain) -> Callable[..., Any]:
        shape, kernel = case.shape, gemma if case.shape.norm == "gemma" else norm

        def run(qkv: Tensor) -> Tensor:
            q, k, v = torch.split(qkv, shape.widths(), dim=-1)
            q, k = (
                kernel(x.reshape(-1, shape.head_dim), weight, shape.eps).view(x.shape)
                for x, weight in ((q, chain.q_weight), (k, chain.k_weight))
            )
            return attended(q, k, v, shape)

        return run

    return build


def _add_norm(module: str, plain: str, gemma: str) -> Peer:
    """Both results in place: the norm in x, the sum in the residual."""

    def build(case: Case, chain: Chain) -> Callable[..., Any]:
        kernel = getattr(import_module(module), gemma if case.shape.norm == "gemma" else plain)

        def run(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            kernel(x, residual, chain.weight, case.shape.eps)
            return residual, x

        return run

    return build


def _flashinfer_gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = import_module("flashinfer.norm").gemma_rmsnorm(x, weight, eps)
    return out


def _flashinfer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = import_module("flashinfer.norm").rmsnorm(x, weight, eps)
    return out


def _flashinfer_rotate(
    positions: Tensor, q: Tensor, k: Tensor, d: int, table: Tensor, neox: bool
) -> None:
    rope = import_module("flashinfer.rope")
    rope.apply_rope_with_cos_sin_cache_inplace(positions, q, k, d, table, neox)


def _sgl_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out: Tensor = import_module("sgl_kernel").rmsnorm(x, weight, eps)
    return out


def _sgl_rotate(positions: Tensor, q: Tensor, k: Tensor, d: int, table: Tensor, neox: bool) -> None:
    kernels = import_module("sgl_kernel")
    kernels.apply_rope_with_cos_sin_cache_inplace(positions, q, k, d, table, neox)


def _sgl_rope_store(case: Case, chain: Chain) -> Callable[..., Any]:
    """Rotation and store in one kernel."""
    kernels = import_module("sgl_kernel")
    d, neox = case.shape.head_dim, case.shape.rotation == "neox"

    def run(
        q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        t = positions.numel()
        buffers = (k_cache.view(len(k_cache), -1), v_cache.view(len(v_cache), -1))
        into = kernels.FusedSetKVBufferArg(v.view(t, -1), *buffers, None, None, slots)
        kernels.apply_rope_with_cos_sin_cache_inplace(
            positions.view(-1), q.view(t, -1), k.view(t, -1), d, chain.table, neox,
            fused_set_kv_buffer_arg=into,
        )  # fmt: skip
        return q

    return run


def _sgl_packed(case: Case, chain: Chain) -> Callable[..., Any]:
    """QK-norm and rotation in one kernel, on the packed projection in place."""
    kernels, shape = import_module("sgl_kernel"), case.shape

    def run(qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        g, d = shape.kv_heads, shape.head_dim
        kernels.fused_qk_norm_rope(
            qkv, shape.heads, g, g, d, shape.eps, chain.q_weight, chain.k_weight, ROPE_BASE,
            shape.rotation == "neox", positions.int(), 1.0, 1.0, 1.0, 1.0, shape.rotary,
        )  # fmt: skip
        q, k, _ = torch.split(qkv, shape.widths(), -1)
        return q.view(len(q), -1, d), k.view(len(k), -1, d)

    return run


def _vllm_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    import_module("vllm._custom_ops").rms_norm(out, x, weight, eps)
    return out


def _vllm_rotate(
    positions: Tensor, q: Tensor, k: Tensor, d: int, table: Tensor, neox: bool
) -> None:
    ops = import_module("vllm._custom_ops")
    ops.rotary_embedding(positions, q, k, d, table.to(q.dtype), neox)


def _liger_prelude(case: Case, chain: Chain) -> Callable[..., Any]:
    """Liger's norm and rotation, torch's own store."""
    norm = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    rotate = import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
    d, eps = case.shape.head_dim, case.shape.eps
    gemma = case.shape.norm == "gemma"
    how = (1.0, "gemma", False) if gemma else (0.0, "llama", False)

    def run(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor,
        k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        heads = (*q.shape[:-1], -1, d)
        q, k, v = q.view(heads), k.view(heads), v.view(heads).transpose(1, 2)
        if case.shape.norm is not None:
            q = norm.apply(q, chain.q_weight, eps, *how)
            k = norm.apply(k, chain.k_weight, eps, *how)
        if cos.shape[-1] < d:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        k_cache.index_copy_(2, slots, k)
        v_cache.index_copy_(2, slots, v)
        return q

    return run


PEERS: dict[str, dict[str, Peer]] = {
    "flashinfer": {
        "diffusion": _norm_rope(_flashinfer_norm, _flashinfer_rotate),
        "rope_store": _rope_store(_flashinfer_rotate),
        "qk_norm": _qk_norm(_flashinfer_norm, _flashinfer_gemma),
        "add_norm": _add_norm("flashinfer.norm", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm"),
    },
    "sgl_kernel": {
        "diffusion": _norm_rope(_sgl_norm, _sgl_rotate),
        "rope_store": _sgl_rope_store,
        "packed": _sgl_packed,
        "add_norm": _add_norm("sgl_kernel", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm"),
    },
    "vllm": {
        "diffusion": _norm_rope(_vllm_norm, _vllm_rotate),
        "rope_store": _rope_store(_vllm_rotate),
    },
    "liger_kernel": {"prelude": _liger_prelude},
}
