"""Wan and the video models of diffusers that grew from it: tiny sizes and inputs.

In: nothing. Out: `WAN_LIKE`, by name.
"""

from __future__ import annotations

import torch

from fxfuse.tiny.diffusion_inputs import video
from fxfuse.tiny.diffusion_unit import AXES, TEXT, TWO_LAYERS, Arguments, Diffusion
from fxfuse.tiny.inputs import noise

BLOCKS: Arguments = {
    **TWO_LAYERS,
    "patch_size": (1, 2, 2),
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 64,
    "cross_attn_norm": True,
}
WAN: Arguments = {**BLOCKS, "rope_max_seq_len": 32}
FAR: Arguments = {**WAN, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 2}
HELIOS: Arguments = {**BLOCKS, "rope_dim": AXES}
ANIMATE: Arguments = {
    **WAN,
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 16,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
ANIMATE_2: Arguments = {
    "text_len": TEXT,
    "in_dim": 12,
    "dim": 128,
    "ffn_dim": 64,
    "freq_dim": 64,
    "text_dim": 16,
    "out_dim": 4,
    "num_heads": 4,
    "num_layers": 2,
    "use_img_emb": False,
}


def _anyflow() -> Arguments:
    steps = {"timestep": torch.tensor([[10.0, 10.0]]), "r_timestep": torch.tensor([[5.0, 5.0]])}
    return {**video(), "hidden_states": noise(1, 2, 4, 8, 8), **steps}


def _anyflow_far(frames: int = 4) -> Arguments:
    """The last frames of three chunks, of which the first has coarser patches."""
    return {
        **video(),
        "hidden_states": noise(1, frames, 4, 8, 8),
        "timestep": torch.full((1, frames), 10.0),
        "r_timestep": torch.full((1, frames), 5.0),
        "chunk_partition": [1, 1, 2],
    }


def _anyflow_far_cached() -> Arguments:
    """The last chunk, which attends to the keys of the others; those are kept unrotated."""
    kept = {"compressed_cache": noise(2, 1, 4, 4, 32), "full_cache": noise(2, 1, 4, 16, 32)}
    flags = {"is_cache_step": False, "num_cached_chunks": 2}
    return {**_anyflow_far(2), "kv_cache": [kept, kept], "kv_cache_flag": flags}


def _helios() -> Arguments:
    """Two frames, and a history of seven that is kept at three resolutions."""
    return video(
        indices_hidden_states=torch.tensor([[7, 8]]),
        latents_history_short=noise(1, 4, 1, 8, 8),
        indices_latents_history_short=torch.tensor([[6]]),
        latents_history_mid=noise(1, 4, 2, 8, 8),
        indices_latents_history_mid=torch.tensor([[4, 5]]),
        latents_history_long=noise(1, 4, 4, 8, 8),
        indices_latents_history_long=torch.arange(4)[None],
    )


def _animate() -> Arguments:
    """Three latent frames; five pictures of a face become two tokens of motion, and one before."""
    return {
        **video(),
        "hidden_states": noise(1, 12, 3, 8, 8),
        "encoder_hidden_states_image": noise(1, 4, 16),
        "pose_hidden_states": noise(1, 4, 2, 8, 8),
        "face_pixel_values": noise(1, 3, 5, 16, 16),
    }


def _animate_2(frames: int, mode: str) -> Arguments:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [noise(4, frames, 4, 4)],
        "condition_latents": [noise(8, frames, 4, 4, seed=6)],
        "encoder_hidden_states": [noise(TEXT, 16)],
        "timestep": torch.tensor([500.0]),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": mode,
        "seq_len": frames * 4,
    }


def _reference() -> Arguments:
    return {**_animate_2(2, "extract"), "offset_grid_sizes": torch.tensor([[2, 2, 2]])}


def _generation() -> Arguments:
    """Three frames that attend to the keys of two frames, which are kept unrotated."""
    inputs = _animate_2(3, "cached")
    for layer in inputs["kv_cache"].layer_caches:
        layer.store(noise(1, 8, 4, 32, seed=7), noise(1, 8, 4, 32, seed=8))
    grid = torch.tensor([[2, 2, 2]])
    return {**inputs, "reference_grid_sizes": grid, "origin_len": 5, "origin_area": [32, 32]}


WAN_LIKE: dict[str, Diffusion] = {
    "anyflow": Diffusion("transformer_anyflow", "AnyFlowTransformer3DModel", WAN, _anyflow),
    "anyflow_far": Diffusion(
        "transformer_anyflow_far", "AnyFlowFARTransformer3DModel", FAR, _anyflow_far
    ),
    "anyflow_far_cached": Diffusion(
        "transformer_anyflow_far", "AnyFlowFARTransformer3DModel", FAR, _anyflow_far_cached
    ),
    "chronoedit": Diffusion("transformer_chronoedit", "ChronoEditTransformer3DModel", WAN, video),
    "helios": Diffusion("transformer_helios", "HeliosTransformer3DModel", HELIOS, _helios),
    "helios_amplified": Diffusion(
        "transformer_helios",
        "HeliosTransformer3DModel",
        {**HELIOS, "is_amplify_history": True},
        _helios,
    ),
    "skyreels_v2": Diffusion("transformer_skyreels_v2", "SkyReelsV2Transformer3DModel", WAN, video),
    "wan": Diffusion("transformer_wan", "WanTransformer3DModel", WAN, video),
    "wan_vace": Diffusion(
        "transformer_wan_vace",
        "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0], "vace_in_channels": 8},
        lambda: video(control_hidden_states=noise(1, 8, 2, 8, 8)),
    ),
    "wan_animate": Diffusion(
        "transformer_wan_animate", "WanAnimateTransformer3DModel", ANIMATE, _animate
    ),
    "wan_animate_2": Diffusion(
        "transformer_wan_animate_2", "WanAnimate2Transformer3DModel", ANIMATE_2, _generation
    ),
    "wan_animate_2_reference": Diffusion(
        "transformer_wan_animate_2", "WanAnimate2Transformer3DModel", ANIMATE_2, _reference
    ),
}
