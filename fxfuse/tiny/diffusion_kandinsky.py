"""The video models Kandinsky 5 and 6 of diffusers: tiny sizes and inputs.

In: nothing. Out: `KANDINSKY`, by name.
"""

from __future__ import annotations

import torch

from fxfuse.tiny.diffusion_inputs import time
from fxfuse.tiny.diffusion_unit import AXES, TEXT, Arguments, Diffusion
from fxfuse.tiny.inputs import noise

SIZES: Arguments = {
    "in_visual_dim": 4,
    "time_dim": 32,
    "out_visual_dim": 4,
    "patch_size": (1, 2, 2),
    "model_dim": 128,
    "ff_dim": 128,
    "num_visual_blocks": 1,
    "axes_dims": AXES,
}
WITH_TEXT: Arguments = {**SIZES, "in_text_dim": 16, "in_text_dim2": 8, "num_text_blocks": 1}


def _kandinsky() -> Arguments:
    return {
        "hidden_states": noise(1, 1, 8, 8, 4),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": time(),
        "pooled_projections": noise(1, 8),
        "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
    }


def _kandinsky6() -> Arguments:
    """A video, the picture that it begins with and that one's mask in nine channels; and sound."""
    return {
        "hidden_states": noise(1, 2, 8, 8, 9),
        "audio_hidden_states": noise(1, 6, 4),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "pooled_projections": noise(1, 8),
        "timestep": time(10.0),
    }


def _kandinsky6_sr() -> Arguments:
    """Two blocks of 64 tokens, as attention takes them."""
    return {"hidden_states": noise(1, 2, 16, 16, 9), "timestep": time(10.0)}


KANDINSKY: dict[str, Diffusion] = {
    "kandinsky5": Diffusion(
        "transformer_kandinsky",
        "Kandinsky5Transformer3DModel",
        WITH_TEXT,
        _kandinsky,
        rounds="bfloat16",
    ),
    "kandinsky6": Diffusion(
        "transformer_kandinsky6",
        "Kandinsky6Transformer3DModel",
        {
            **WITH_TEXT,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
        },
        _kandinsky6,
    ),
    "kandinsky6_sr": Diffusion(
        "transformer_kandinsky6_sr", "Kandinsky6SRTransformer3DModel", SIZES, _kandinsky6_sr
    ),
}
