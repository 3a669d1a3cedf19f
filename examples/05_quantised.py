"""Quantised weights: a linear layer of integers, and torchao's, where that is installed.

    python examples/05_quantised.py

How q, k and v are projected is no matter: norm, rotation and store are fused behind the projection,
whether integers are widened in the graph or a kernel of their own multiplies them.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tour import compare, qwen3, token_ids

import fxfuse


class Int8Linear(nn.Module):
    """Rows of int8 with a scale each, widened where they are used."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127  # [out, 1]
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().char())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


@torch.no_grad()
def run(what: str, model: nn.Module) -> None:
    ids = token_ids(1, 7)
    got = torch.compile(model, backend=fxfuse.backend)(ids, use_cache=False).logits
    print(fxfuse.last_report())
    compare(what, got, model(ids, use_cache=False).logits)


if __name__ == "__main__":
    model = qwen3()
    for layer in model.model.layers:
        for name, child in list(layer.self_attn.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer.self_attn, name, Int8Linear(child))
    run("int8 rows", model)
    if importlib.util.find_spec("torchao") is None:
        print("left out: torchao is not installed, pip install torchao")
    else:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = qwen3()
        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
        run("torchao int8", model)
