"""World models of diffusers, which answer to a camera or to actions: tiny sizes and inputs.

In: nothing. Out: `WORLDS`, by name.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import interpolate

from fxfuse.tiny.diffusion_inputs import video
from fxfuse.tiny.diffusion_unit import TEXT, TWO_LAYERS, Arguments, Diffusion
from fxfuse.tiny.diffusion_videos import LTX2
from fxfuse.tiny.inputs import ids, noise

FILE = "diffusers.models.transformers"
COSMOS3: Arguments = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "latent_channel": 4,
    "patch_latent_dim": 16,
    "rope_axes_dim": (6, 5, 5),
    "vocab_size": 32,
}
SANA: Arguments = {
    "in_channels": 4,
    "num_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "softmax_every_n": 2,  # of two layers one is linear attention, one is softmax
    "linear_head_dim": 32,
    "caption_channels": 8,
    "mlp_ratio": 2.0,
    "chunk_plucker_channels": 8,
    "chunk_plucker_post_attn_blocks": 2,
}


def _cosmos() -> Arguments:
    file: Any = sys.modules[f"{FILE}.transformer_cosmos"]
    if not hasattr(file, "transforms"):  # torchvision, needed for one resize only
        nearest = SimpleNamespace(resize=lambda x, size, **_: interpolate(x, size=size))
        modes = SimpleNamespace(NEAREST=None)
        file.transforms = SimpleNamespace(functional=nearest, InterpolationMode=modes)
    mask = torch.zeros(1, 1, 8, 8)
    return video(frames=1, fps=30, padding_mask=mask, attention_mask=torch.ones(1, TEXT))


def _cosmos3() -> Arguments:
    """Four tokens of text, then two frames of 2 x 2 patches, in one sequence."""
    frames = torch.arange(4, 12)
    positions = torch.arange(12).repeat(3, 1)
    positions[:, frames] = 4 + torch.cartesian_prod(*[torch.arange(2)] * 3).T
    return {
        "input_ids": ids(4, below=32),
        "text_indexes": torch.arange(4),
        "position_ids": positions,
        "und_len": 4,
        "sequence_length": 12,
        "vision_tokens": [noise(1, 4, 2, 4, 4)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": frames,
        "vision_mse_loss_indexes": frames,
        "vision_timesteps": torch.full((8,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


def _sana_wm() -> Arguments:
    """A camera that moves forward through four frames of 4 x 4."""
    camera = torch.eye(4).repeat(1, 4, 1, 1)
    camera[..., 2, 3] = 0.1 * torch.arange(4)
    lens = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(1, 4, 4)
    return {
        "hidden_states": noise(1, 4, 4, 4, 4),
        "timestep": torch.full((1, 1, 4), 500.0),
        "encoder_hidden_states": noise(1, 1, TEXT, 8),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.long),
        "camera_conditions": torch.cat([camera.flatten(-2), lens], dim=-1),
        "chunk_plucker": noise(1, 8, 4, 4, 4),
    }


def _tables(kind: str, first: int, frames: int) -> Any:
    """Tables for frames of 4 x 4; where channels interleave these are of all heads together."""
    file: Any = sys.modules[f"{FILE}.transformer_sana_wm_refiner"]
    rope = file.SanaWMLTX2AudioVideoRotaryPosEmbed(
        dim=128, double_precision=False, rope_type=kind, num_attention_heads=4
    )
    coords = rope.prepare_video_coords(1, first + frames, 4, 4, device="cpu", fps=24.0)
    return rope(coords[:, :, 16 * first :], device="cpu")


def _refiner(kind: str) -> Arguments:
    return {
        "hidden_states": noise(1, 32, 4),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": torch.full((1, 32), 500.0),
        "video_rotary_emb": _tables(kind, first=0, frames=2),
        "encoder_attention_mask": torch.ones(1, TEXT),
    }


def _refiner_cached() -> Arguments:
    """Two frames that attend to the keys of a third, unrotated, and of a fourth, rotated."""
    file: Any = sys.modules[f"{FILE}.transformer_sana_wm_refiner"]
    cache = file.SanaWMRefinerKVCache(2)
    cache.sink_pe = _tables("interleaved", first=0, frames=1)
    for layer in cache.layer_caches:
        layer.store_sink(noise(1, 16, 128), noise(1, 16, 128, seed=6))
        layer.store_history(noise(1, 16, 128, seed=7), noise(1, 16, 128, seed=8))
    tables = _tables("interleaved", first=2, frames=2)
    kept = {"kv_cache": cache, "kv_cache_mode": "inject"}
    return {**_refiner("interleaved"), "video_rotary_emb": tables, **kept}


WORLDS: dict[str, Diffusion] = {
    "cosmos": Diffusion(
        "transformer_cosmos",
        "CosmosTransformer3DModel",
        {
            **TWO_LAYERS,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
        },
        _cosmos,
    ),
    "cosmos3": Diffusion(
        "transformer_cosmos3",
        "Cosmos3OmniTransformer",
        COSMOS3,
        _cosmos3,
    ),
    "cosmos3_edge": Diffusion(
        "transformer_cosmos3",
        "Cosmos3OmniTransformer",
        {
            **COSMOS3,
            "hidden_act": "relu2",
            "qk_norm_for_text": False,
            "use_und_k_norm_for_gen": True,
        },
        _cosmos3,
    ),
    "sana_wm": Diffusion("transformer_sana_wm", "SanaWMTransformer3DModel", SANA, _sana_wm),
    "sana_wm_refiner": Diffusion(
        "transformer_sana_wm_refiner",
        "SanaWMLTX2RefinerTransformer3DModel",
        LTX2,
        lambda: _refiner("interleaved"),
    ),
    "sana_wm_refiner_cached": Diffusion(
        "transformer_sana_wm_refiner",
        "SanaWMLTX2RefinerTransformer3DModel",
        LTX2,
        _refiner_cached,
    ),
    "sana_wm_refiner_split": Diffusion(
        "transformer_sana_wm_refiner",
        "SanaWMLTX2RefinerTransformer3DModel",
        {**LTX2, "rope_type": "split"},
        lambda: _refiner("split"),
    ),
}
