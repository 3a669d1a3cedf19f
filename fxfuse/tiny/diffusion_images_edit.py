"""Image models of diffusers that see other images beside the one they draw: sizes and inputs.

In: nothing. Out: `EDITS`, by name.
"""

from __future__ import annotations

import torch

from fxfuse.tiny.diffusion_inputs import image, time
from fxfuse.tiny.diffusion_unit import AXES, HEADS, TEXT, Arguments, Diffusion
from fxfuse.tiny.inputs import noise


def _bria_fibo2() -> Arguments:
    """Text for the gist tokens and for the one layer that reads it again, and an image of 4 x 4."""
    return image(
        encoder_hidden_states=noise(1, 2, TEXT, 32),
        timestep=time(0.5),
        context_latents=[noise(1, 4, 4, 4, seed=6)],
    )


def _joyimage() -> Arguments:
    """Two samples: only the first has a second image, so their positions differ."""
    return {
        "hidden_states": noise(2, 20, 4, 1, 2, 2),
        "timestep": torch.tensor([10.0, 20.0]),
        "encoder_hidden_states": noise(2, TEXT, 16),
        "encoder_hidden_states_mask": torch.ones(2, TEXT),
        "shape_list": [[(1, 4, 4), (1, 2, 2)], [(1, 4, 4)]],
    }


def _qwenimage21() -> Arguments:
    """An image of 2 x 2 tokens in the text's third place, and one of 4 x 4 at the end."""
    slots = torch.zeros(1, TEXT + 4, dtype=torch.bool)
    slots[:, 2] = slots[:, TEXT:] = True
    return {
        "hidden_states": noise(1, 4 + 16, 16),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": time(0.5),
        "img_shapes": [[(1, 2, 2), (1, 4, 4)]],
        "img_mask": slots,
    }


EDITS: dict[str, Diffusion] = {
    "bria_fibo2": Diffusion(
        "transformer_bria_fibo2",
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 128,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "cap_feat_dim": 32,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": AXES,
            "axes_lens": (16, 16, 16),
        },
        _bria_fibo2,
    ),
    "joyimage_edit_plus": Diffusion(
        "transformer_joyimage_edit_plus",
        "JoyImageEditPlusTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": AXES,
        },
        _joyimage,
    ),
    "qwenimage21": Diffusion(
        "transformer_qwenimage21",
        "QwenImage21Transformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "context_in_dim": 16,
            "axes_dims_rope": AXES,
        },
        _qwenimage21,
    ),
}
