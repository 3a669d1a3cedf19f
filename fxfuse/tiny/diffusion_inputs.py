"""The form of a diffusers unit, and inputs that several of them share.

In: sizes. Out: `Diffusion` entries and dicts of tensors. Batch is one, latents are a few patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxfuse.tiny.inputs import noise

Arguments = dict[str, Any]
HEADS: Arguments = {"num_attention_heads": 4, "attention_head_dim": 32}
FOUR_CHANNELS: Arguments = {"in_channels": 4, "out_channels": 4}
TWO_LAYERS: Arguments = {**HEADS, **FOUR_CHANNELS, "num_layers": 2}
# Rotary channels of three axes, 32 in all.
AXES = (8, 12, 12)
TEXT = 8  # tokens of a prompt


@dataclass(frozen=True)
class Diffusion:
    """A class in a file of diffusers.models.transformers, its arguments and its inputs."""

    file: str
    model: str
    sizes: Arguments
    inputs: Callable[[], Arguments]
    rounds: str = ""


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
