"""Image models of diffusers that turn no q and k, and would look like it to a careless reader.

In: nothing. Out: `PLAIN`, by name. fxfuse/sweep/no_rotation.py has what is special about each.
"""

from __future__ import annotations

from fxfuse.tiny.diffusion_inputs import image
from fxfuse.tiny.diffusion_unit import CHANNELS, HEADS, TWO_LAYERS, Diffusion
from fxfuse.tiny.inputs import noise

PLAIN: dict[str, Diffusion] = {
    "aura_flow": Diffusion(
        "auraflow_transformer_2d",
        "AuraFlowTransformer2DModel",
        {
            **HEADS,
            **CHANNELS,
            "sample_size": 16,
            "patch_size": 2,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "caption_projection_dim": 128,
            "joint_attention_dim": 32,
            "pos_embed_max_size": 64,
        },
        image,
    ),
    "pixart": Diffusion(
        "pixart_transformer_2d",
        "PixArtTransformer2DModel",
        {
            **TWO_LAYERS,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 128,
            "out_channels": 8,
            "caption_channels": 16,
            "use_additional_conditions": False,
            "norm_type": "ada_norm_single",
        },
        lambda: image(width=16, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "sana": Diffusion(
        "sana_transformer",
        "SanaTransformer2DModel",
        {
            **TWO_LAYERS,
            "patch_size": 1,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 128,
            "caption_channels": 8,
            "sample_size": 8,
            "qk_norm": "rms_norm_across_heads",
        },
        lambda: image(width=8),
    ),
    "sd3": Diffusion(
        "transformer_sd3",
        "SD3Transformer2DModel",
        {
            **TWO_LAYERS,
            "sample_size": 16,
            "patch_size": 1,
            "caption_projection_dim": 128,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 32,
            "dual_attention_layers": (),
            "qk_norm": "rms_norm",
        },
        lambda: image(pooled_projections=noise(1, 64)),
    ),
}
