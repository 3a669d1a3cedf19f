"""The form of a diffusers unit, and sizes that several of them share.

In: nothing. Out: the form of an entry, and arguments of tiny models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Arguments = dict[str, Any]
HEADS: Arguments = {"num_attention_heads": 4, "attention_head_dim": 32}
CHANNELS: Arguments = {"in_channels": 4, "out_channels": 4}
TWO_LAYERS: Arguments = {**HEADS, **CHANNELS, "num_layers": 2}
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
