"""Inputs that several diffusers units share.

In: sizes. Out: dicts of tensors. Batch is one, latents are a few patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.tiny.diffusion_unit import TEXT, Arguments
from fxfuse.tiny.inputs import noise


def time(value: float = 1.0) -> Tensor:
    return torch.tensor([value])


def grid(height: int, width: int, axes: int = 3) -> Tensor:
    """Positions of an image's patches, [height * width, axes]; only the last two axes count."""
    positions = torch.zeros(height * width, axes)
    positions[:, -2] = torch.arange(height).repeat_interleave(width)
    positions[:, -1] = torch.arange(width).repeat(height)
    return positions


def image(width: int = 32, channels: int = 4, **more: Any) -> Arguments:
    """A latent image of 8 x 8 and a prompt of `width` channels."""
    return {
        "hidden_states": noise(1, channels, 8, 8),
        "encoder_hidden_states": noise(1, TEXT, width),
        "timestep": time(10.0),
        **more,
    }


def video(
    width: int = 16, frames: int = 2, side: int = 8, text: int = TEXT, **more: Any
) -> Arguments:
    """A latent video and a prompt of `width` channels."""
    return {
        "hidden_states": noise(1, 4, frames, side, side),
        "encoder_hidden_states": noise(1, text, width),
        "timestep": time(10.0),
        **more,
    }


def tokens(**more: Any) -> Arguments:
    """Sixteen image tokens with positions, and a prompt, as Flux takes them."""
    return {
        "hidden_states": noise(1, 16, 4),
        "encoder_hidden_states": noise(1, TEXT, 32),
        "img_ids": grid(4, 4),
        "txt_ids": torch.zeros(TEXT, 3),
        "timestep": time(),
        **more,
    }


def all_true(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)
