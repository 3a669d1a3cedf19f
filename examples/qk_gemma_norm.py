"""QK Gemma RMSNorm from one gated projection: [q and gate by head, k, v], as Qwen3.5 has it.

    python examples/qk_gemma_norm.py

A serving engine's native path norms q and k as rows of heads, which copies q and k out of the
projection. The fused op reads them where they lie, in one launch. By itself the gate leaves these
norms to Inductor, whose kernels are as fast; here it is told to fuse.
"""

from __future__ import annotations

import torch
from showing import Chain, main
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

HEADS, KV_HEADS, D, EPS = 16, 2, 256, 1e-6


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) * (1 + weight), in float32. Shapes: x [rows, D], weight [D]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS)
    return (wide * (1.0 + weight.float())).to(x.dtype)


def run(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """Attention of all tokens with each other, gated. Shapes: qkv [T, (2 H + 2 G) * D]."""
    q_gate, k, v = qkv.split([2 * HEADS * D, KV_HEADS * D, KV_HEADS * D], dim=-1)
    q, gate = q_gate.view(-1, HEADS, 2 * D).chunk(2, dim=-1)  # [T, H, D]
    q = gemma_norm(q.reshape(-1, D), q_weight).view(-1, HEADS, D)
    k = gemma_norm(k.reshape(-1, D), k_weight).view(-1, KV_HEADS, D)
    v = v.view(-1, KV_HEADS, D)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, T, D]
    out = attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1) * gate.sigmoid()


def inputs(device: str, dtype: torch.dtype, tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    weights = (torch.nn.Parameter(draw(D) * 0.2, requires_grad=False) for _ in range(2))
    return (draw(tokens, (2 * HEADS + 2 * KV_HEADS) * D), *weights)


CHAIN = Chain("QK Gemma RMSNorm", run, inputs, options={"gate": "always"})

if __name__ == "__main__":
    raise SystemExit(main(CHAIN))
