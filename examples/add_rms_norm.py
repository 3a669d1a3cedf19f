"""Residual add and Gemma RMSNorm, with a second addend, as a serving engine's layer spells it.

    python examples/add_rms_norm.py

In front of a decoder layer's norm its native path adds what another part of the model sends along
to the residual, then the layer's own output, each in the working dtype; the sum goes on as the new
residual. One op makes both results. By itself the gate leaves it to Inductor, whose kernel is as
fast; here it is told to fuse. The report says which provider took it, and why others did not:
FlashInfer's kernel, where installed, norms the sum before it is rounded and is no equal.
"""

from __future__ import annotations

import torch
from showing import Chain, main
from torch import Tensor

HIDDEN, EPS = 4096, 1e-6


def run(x: Tensor, residual: Tensor, post: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Norm of x + (residual + post), and the sum. Shapes: [T, hidden], weight [hidden]."""
    residual = residual + post
    residual = x + residual
    wide = residual.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS)
    return (wide * (1.0 + weight.float())).to(x.dtype), residual


def inputs(device: str, dtype: torch.dtype, tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    rows = (draw(tokens, HIDDEN) for _ in range(3))
    return (*rows, torch.nn.Parameter(draw(HIDDEN) * 0.2, requires_grad=False))


CHAIN = Chain("residual add + Gemma RMSNorm", run, inputs, options={"gate": "always"})

if __name__ == "__main__":
    raise SystemExit(main(CHAIN))
