"""Rotary models of diffusers, and four that normalise q and k without rotating them.

In: nothing. Out: units, models and inputs by name (`diffusers/flux`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from fxfuse.tiny.diffusion_flux import FLUX_LIKE
from fxfuse.tiny.diffusion_images import IMAGES
from fxfuse.tiny.diffusion_images_edit import EDITS
from fxfuse.tiny.diffusion_kandinsky import KANDINSKY
from fxfuse.tiny.diffusion_plain import PLAIN
from fxfuse.tiny.diffusion_sounds import SOUNDS
from fxfuse.tiny.diffusion_videos import VIDEOS
from fxfuse.tiny.diffusion_wan import WAN_LIKE
from fxfuse.tiny.diffusion_worlds import WORLDS
from fxfuse.tiny.units import ROTARY, Unit

ENTRIES = EDITS | FLUX_LIKE | IMAGES | KANDINSKY | PLAIN | SOUNDS | VIDEOS | WAN_LIKE | WORLDS
TABLE = {f"diffusers/{name}": entry for name, entry in sorted(ENTRIES.items())}
FOLDER = "diffusers.models.transformers"


def diffusers_units() -> dict[str, Unit]:
    """Every unit of diffusers by name; a rotary file without an entry is one that cannot run."""
    units = {
        name: Unit(
            name,
            f"{FOLDER}.{entry.file}",
            entry.model,
            library="diffusers",
            rounds=entry.rounds,
        )
        for name, entry in TABLE.items()
    }
    known = {unit.module for unit in units.values()}
    for path in sorted(Path(diffusers.__file__).parent.glob("models/transformers/*.py")):
        name, module = f"diffusers/{_short(path.stem)}", f"{FOLDER}.{path.stem}"
        if module not in known and ROTARY.search(path.read_text()):
            units[name] = Unit(name, module, model="", library="diffusers")
    return units


def _short(file: str) -> str:
    return file.removeprefix("transformer_").removesuffix("_transformer")


def diffusers_model(unit: Unit) -> nn.Module:
    if unit.name not in TABLE:
        raise LookupError("no tiny sizes for it in fxfuse/tiny/diffusion_*.py")
    torch.manual_seed(0)
    model: nn.Module = unit.model_class()(**TABLE[unit.name].sizes)
    return model


def diffusers_inputs(name: str, *_: Any) -> dict[str, Any]:
    return TABLE[name].inputs()
