"""Rotary models of diffusers, and four that normalise q and k without rotating them.

In: nothing. Out: units, models and inputs by name (`diffusers/flux`).
"""

from __future__ import annotations

from typing import Any

import diffusers  # noqa: F401  names itself where it is missing
import torch
from torch import nn

from tests.sweep.diffusion_flux import FLUX_LIKE
from tests.sweep.diffusion_images import IMAGES
from tests.sweep.diffusion_videos import VIDEOS
from tests.sweep.units import Unit

TABLE = {
    f"diffusers/{name}": entry for name, entry in sorted((FLUX_LIKE | IMAGES | VIDEOS).items())
}
FOLDER = "diffusers.models.transformers"


def diffusers_units() -> dict[str, Unit]:
    """Every unit of diffusers, by name."""
    return {
        name: Unit(name, f"{FOLDER}.{entry.file}", entry.model, library="diffusers")
        for name, entry in TABLE.items()
    }


def diffusers_model(unit: Unit) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = unit.model_class()(**TABLE[unit.name].sizes)
    return model


def diffusers_inputs(name: str, *_: Any) -> dict[str, Any]:
    return TABLE[name].inputs()
