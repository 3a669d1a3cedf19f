"""Image models of diffusers of Flux's form: tiny sizes and inputs.

In: nothing. Out: `FLUX_LIKE`, by name. Each has a block with two streams and one with a single one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxfuse.tiny.diffusion_inputs import grid, time, tokens
from fxfuse.tiny.diffusion_unit import AXES, HEADS, TEXT, Arguments, Diffusion
from fxfuse.tiny.inputs import noise

FLUX: Arguments = {
    **HEADS,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 32,
}


def _places(side: int, frame: float = 0.0) -> Tensor:
    """Positions of a square image, (frame, row, column, word) each."""
    before, after = torch.full((side * side, 1), frame), torch.zeros(side * side, 1)
    return torch.cat([before, grid(side, side, axes=2), after], dim=1)


def _words() -> Tensor:
    return torch.cat([torch.zeros(TEXT, 3), torch.arange(float(TEXT))[:, None]], dim=1)


def _flux2() -> Arguments:
    return tokens(img_ids=_places(4)[None], txt_ids=_words()[None], guidance=time())


def _flux3() -> Arguments:
    """With an image of 2 x 2 tokens to look at."""
    return tokens(
        img_ids=_places(4),
        txt_ids=_words(),
        timestep=time(0.5),
        image_cond_hidden_states=noise(1, 4, 4),
        image_cond_ids=_places(2, frame=10.0),
    )


def flux(model: str, file: str, inputs: Callable[[], Arguments], **sizes: Any) -> Diffusion:
    return Diffusion(file, model, {**FLUX, "axes_dims_rope": AXES, **sizes}, inputs)


FLUX_LIKE: dict[str, Diffusion] = {
    "bria": flux("BriaTransformer2DModel", "transformer_bria", tokens, pooled_projection_dim=None),
    "bria_fibo": flux(
        "BriaFiboTransformer2DModel",
        "transformer_bria_fibo",
        lambda: tokens(text_encoder_layers=[noise(1, TEXT, 16)] * 2),
        text_encoder_dim=16,
    ),
    "chroma": flux(
        "ChromaTransformer2DModel",
        "transformer_chroma",
        tokens,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ),
    "flux": flux(
        "FluxTransformer2DModel",
        "transformer_flux",
        lambda: tokens(pooled_projections=noise(1, 32)),
        pooled_projection_dim=32,
    ),
    "flux2": flux(
        "Flux2Transformer2DModel",
        "transformer_flux2",
        _flux2,
        axes_dims_rope=(8, 8, 8, 8),
        timestep_guidance_channels=256,
    ),
    "flux3": Diffusion(
        "transformer_flux3",
        "Flux3Transformer2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 8, 8, 8),
        },
        _flux3,
    ),
    "longcat_image": flux(
        "LongCatImageTransformer2DModel",
        "transformer_longcat_image",
        lambda: tokens(guidance=time(3.5)),
        pooled_projection_dim=32,
    ),
    "ovis_image": flux("OvisImageTransformer2DModel", "transformer_ovis_image", tokens),
}
