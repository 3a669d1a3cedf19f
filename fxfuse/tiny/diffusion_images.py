"""Image models of diffusers: tiny sizes and inputs.

In: nothing. Out: `IMAGES`, by name.
"""

from __future__ import annotations

import torch

from fxfuse.tiny.diffusion_inputs import all_true, grid, image, time
from fxfuse.tiny.diffusion_unit import AXES, CHANNELS, HEADS, TEXT, TWO_LAYERS, Arguments, Diffusion
from fxfuse.tiny.inputs import ids, noise


def _ideogram() -> Arguments:
    from diffusers.models.transformers import transformer_ideogram4 as file

    text, patches = 6, 4
    offset = getattr(file, "IMAGE_POSITION_OFFSET", 65536)
    positions = torch.zeros(1, text + patches, 3, dtype=torch.int64)
    positions[:, :text] = torch.arange(text)[None, :, None]
    positions[:, text:, 0] = offset
    positions[:, text:, 1:] = offset + grid(2, 2, axes=2).long()
    kind = torch.full((1, text + patches), getattr(file, "LLM_TOKEN_INDICATOR", 3))
    kind[:, text:] = getattr(file, "OUTPUT_IMAGE_INDICATOR", 2)
    return {
        "hidden_states": noise(1, text + patches, 16),
        "encoder_hidden_states": noise(1, text + patches, 32),
        "timestep": time(0.5),
        "position_ids": positions,
        "segment_ids": torch.ones(1, text + patches, dtype=torch.int64),
        "indicator": kind,
    }


def _krea2() -> Arguments:
    text, patches = 5, 16
    return {
        "hidden_states": noise(1, patches, 16),
        "encoder_hidden_states": noise(1, text, 3, 64),
        "timestep": time(0.5),
        "position_ids": torch.cat([torch.zeros(text, 3), grid(4, 4)]),
        "encoder_attention_mask": all_true(1, text),
    }


def _omnigen() -> Arguments:
    text = 6
    length = text + 1 + 16
    return {
        "hidden_states": noise(1, 4, 8, 8),
        "timestep": time(),
        "input_ids": ids(1, text, below=10),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, length, length),
        "position_ids": torch.arange(length)[None],
    }


def _lumina_next() -> Arguments:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return image(
        encoder_mask=torch.ones(1, TEXT),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(32, 384, 384),
        cross_attention_kwargs={},
    )


def _cogview4() -> Arguments:
    size = torch.tensor([[64.0, 64.0]])
    return image(width=8, original_size=size, target_size=size, crop_coords=torch.zeros(1, 2))


def _glm_image() -> Arguments:
    return image(
        prior_token_id=ids(1, 16, below=64),
        prior_token_drop=torch.zeros(1, 16, dtype=torch.bool),
        target_size=torch.tensor([[64.0, 64.0]]),
        crop_coords=torch.zeros(1, 2),
    )


def _hidream() -> Arguments:
    return {
        "hidden_states": noise(1, 4, 16, 16),
        "timesteps": time(),
        "encoder_hidden_states_t5": noise(1, TEXT, 8),
        "encoder_hidden_states_llama3": noise(2, 1, TEXT, 4),
        "pooled_embeds": noise(1, 8),
    }


def _hunyuan() -> Arguments:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    side = 4
    return image(
        text_embedding_mask=torch.ones(1, TEXT),
        encoder_hidden_states_t5=noise(1, TEXT, 32),
        text_embedding_mask_t5=torch.ones(1, TEXT),
        image_rotary_emb=get_2d_rotary_pos_embed(32, ((0, 0), (side, side)), (side, side)),
    )


def _qwenimage() -> Arguments:
    return {
        "hidden_states": noise(1, 16, 16),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.int64),
        "timestep": time(),
        "img_shapes": [(1, 4, 4)],
    }


def _z_image() -> Arguments:
    return {"x": [noise(16, 1, 8, 8)], "cap_feats": [noise(16, 16)], "t": time(0.0)}


def _ernie() -> Arguments:
    return {
        "hidden_states": noise(1, 16, 4, 4),
        "timestep": time(),
        "text_bth": noise(1, TEXT, 16),
        "text_lens": torch.tensor([TEXT]),
    }


IMAGES: dict[str, Diffusion] = {
    "cogview4": Diffusion(
        "transformer_cogview4",
        "CogView4Transformer2DModel",
        {
            **TWO_LAYERS,
            "patch_size": 2,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "rope_axes_dim": (16, 16),
        },
        _cogview4,
    ),
    "ernie_image": Diffusion(
        "transformer_ernie_image",
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_theta": 256,
            "rope_axes_dim": AXES,
            "qk_layernorm": True,
        },
        _ernie,
    ),
    "glm_image": Diffusion(
        "transformer_glm_image",
        "GlmImageTransformer2DModel",
        {
            **TWO_LAYERS,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        _glm_image,
    ),
    "hidream": Diffusion(
        "transformer_hidream_image",
        "HiDreamImageTransformer2DModel",
        {
            **HEADS,
            **CHANNELS,
            "patch_size": 2,
            "num_layers": 1,
            "num_single_layers": 1,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": AXES,
            "max_resolution": (16, 16),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        _hidream,
    ),
    "hunyuan_transformer_2d": Diffusion(
        "hunyuan_transformer_2d",
        "HunyuanDiT2DModel",
        {
            **HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 128,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "text_len": TEXT,
            "text_len_t5": TEXT,
            "use_style_cond_and_image_meta_size": False,
        },
        _hunyuan,
    ),
    "hunyuanimage": Diffusion(
        "transformer_hunyuanimage",
        "HunyuanImageTransformer2DModel",
        {
            **TWO_LAYERS,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "rope_axes_dim": (16, 16),
        },
        lambda: image(encoder_attention_mask=torch.ones(1, TEXT)),
    ),
    "ideogram4": Diffusion(
        "transformer_ideogram4",
        "Ideogram4Transformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 32,
            "mrope_section": (6, 5, 5),
        },
        _ideogram,
    ),
    "krea2": Diffusion(
        "transformer_krea2",
        "Krea2Transformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "num_layers": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 64,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": AXES,
        },
        _krea2,
    ),
    "lumina2": Diffusion(
        "transformer_lumina2",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 96,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": AXES,
            "axes_lens": (64, 64, 64),
            "cap_feat_dim": 32,
        },
        lambda: image(encoder_attention_mask=all_true(1, TEXT)),
    ),
    "lumina_next": Diffusion(
        "lumina_nextdit2d",
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 128,
            "num_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "norm_eps": 1e-5,
            "learn_sigma": False,
            "qk_norm": True,
            "cross_attention_dim": 32,
        },
        _lumina_next,
    ),
    "nucleusmoe_image": Diffusion(
        "transformer_nucleusmoe_image",
        "NucleusMoEImageTransformer2DModel",
        {
            **HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "num_key_value_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": AXES,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 2,
            "moe_intermediate_dim": 32,
            "capacity_factors": 1.0,
        },
        _qwenimage,
    ),
    "omnigen": Diffusion(
        "transformer_omnigen",
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 128,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
        },
        _omnigen,
    ),
    "prx": Diffusion(
        "transformer_prx",
        "PRXTransformer2DModel",
        {
            "in_channels": 16,
            "patch_size": 2,
            "context_in_dim": 32,
            "hidden_size": 128,
            "mlp_ratio": 2.0,
            "num_heads": 4,
            "depth": 2,
            "axes_dim": [16, 16],
        },
        lambda: image(channels=16),
    ),
    "qwenimage": Diffusion(
        "transformer_qwenimage",
        "QwenImageTransformer2DModel",
        {
            **HEADS,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": AXES,
        },
        _qwenimage,
    ),
    "z_image": Diffusion(
        "transformer_z_image",
        "ZImageTransformer2DModel",
        {
            "in_channels": 16,
            "dim": 128,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 16,
            "axes_dims": list(AXES),
            "axes_lens": [256, 32, 32],
        },
        _z_image,
    ),
}
