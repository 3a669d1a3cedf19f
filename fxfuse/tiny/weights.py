"""Weights that let errors show.

In: a model. Out: the same, its weights random but of a size at which every part of it matters.
"""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that let errors show, in place.

    Linear layers get outputs of unit variance and norm weights are scattered around their own
    centre (1, or 0 where the model adds 1). The default initialisation (standard deviation 0.02)
    makes attention nearly uniform, and a wrong rotation invisible.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or not weight.numel():
            continue
        noise = torch.randn(weight.shape, generator=generator)
        weight.nan_to_num_(0.0, 0.0, 0.0)  # a parameter may be memory that nobody wrote
        if "norm" in name:
            weight.copy_(weight.mean().round().clamp(-1, 1) + 0.2 * noise)
        elif _is_embedding(name, weight):
            weight.copy_(0.5 * noise)
        elif weight.dim() > 1:
            weight.copy_(noise / math.sqrt(_fan_in(weight)))
        else:
            weight.add_(0.05 * noise)
    return model


def _is_embedding(name: str, weight: Tensor) -> bool:
    is_table = weight.dim() == 2 and weight.shape[0] > weight.shape[1]
    return is_table and ("embed" in name or "wte" in name)


def _fan_in(weight: Tensor) -> int:
    """Inputs of one output: of a linear layer, of stacked experts, of a convolution."""
    if weight.dim() > 3:
        return weight[0].numel()
    return max(weight.shape[-2:]) if weight.dim() == 3 else weight.shape[-1]
