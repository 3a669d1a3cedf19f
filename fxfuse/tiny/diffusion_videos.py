"""Video models of diffusers, and one of sound: tiny sizes and inputs.

In: nothing. Out: `VIDEOS`, by name.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import interpolate

from fxfuse.tiny.diffusion_inputs import all_true, time, video
from fxfuse.tiny.diffusion_unit import AXES, CHANNELS, HEADS, TEXT, TWO_LAYERS, Arguments, Diffusion
from fxfuse.tiny.inputs import noise

FILE = "diffusers.models.transformers"
WAN: Arguments = {
    **TWO_LAYERS,
    "patch_size": (1, 2, 2),
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 64,
    "rope_max_seq_len": 32,
    "cross_attn_norm": True,
}
COGVIDEO: Arguments = {
    **TWO_LAYERS,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 8,
    "use_rotary_positional_embeddings": True,
}
LTX: Arguments = {**TWO_LAYERS, "cross_attention_dim": 128, "caption_channels": 16}
LTX2: Arguments = {
    **LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 64,
    "rope_double_precision": False,
}
HUNYUAN: Arguments = {
    **HEADS,
    **CHANNELS,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": AXES,
}


def _hunyuan() -> Arguments:
    return video(
        frames=1,
        side=4,
        pooled_projections=noise(1, 8),
        encoder_attention_mask=torch.ones(1, TEXT),
        guidance=time(1000.0),
    )


def _hunyuan15() -> Arguments:
    return {
        "hidden_states": noise(1, 4, 1, 4, 4),
        "timestep": time(),
        "encoder_hidden_states": noise(1, 6, 16),
        "encoder_hidden_states_2": noise(1, 4, 8),
        "encoder_attention_mask": torch.ones(1, 6),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 3, 12),
    }


def _ltx() -> Arguments:
    return {
        "hidden_states": noise(1, 32, 4),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": time(10.0),
        "encoder_attention_mask": all_true(1, TEXT),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def _ltx2() -> Arguments:
    return {
        **_ltx(),
        "audio_hidden_states": noise(1, 9, 4),
        "audio_encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": time(500.0),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def _cogvideo() -> Arguments:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, side = 2, 4
    area = ((0, 0), (side, side))
    return {
        "hidden_states": noise(1, frames, 4, 8, 8),
        "encoder_hidden_states": noise(1, TEXT, 8),
        "timestep": torch.tensor([10]),
        "image_rotary_emb": get_3d_rotary_pos_embed(32, area, (side, side), frames, device="cpu"),
    }


def _cosmos() -> Arguments:
    file: Any = sys.modules[f"{FILE}.transformer_cosmos"]
    if not hasattr(file, "transforms"):  # torchvision, needed for one resize only
        nearest = SimpleNamespace(resize=lambda x, size, **_: interpolate(x, size=size))
        modes = SimpleNamespace(NEAREST=None)
        file.transforms = SimpleNamespace(functional=nearest, InterpolationMode=modes)
    mask = torch.zeros(1, 1, 8, 8)
    return video(frames=1, fps=30, padding_mask=mask, attention_mask=torch.ones(1, TEXT))


def _kandinsky() -> Arguments:
    return {
        "hidden_states": noise(1, 1, 8, 8, 4),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "timestep": time(),
        "pooled_projections": noise(1, 8),
        "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
    }


def _audio() -> Arguments:
    return {
        "hidden_states": noise(1, 8, 16),
        "timestep": time(0.5),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "global_hidden_states": noise(1, 16),
    }


def _anyflow() -> Arguments:
    steps = {"timestep": torch.tensor([[10.0, 10.0]]), "r_timestep": torch.tensor([[5.0, 5.0]])}
    return {**video(), "hidden_states": noise(1, 2, 4, 8, 8), **steps}


VIDEOS: dict[str, Diffusion] = {
    "anyflow": Diffusion("transformer_anyflow", "AnyFlowTransformer3DModel", WAN, _anyflow),
    "chronoedit": Diffusion("transformer_chronoedit", "ChronoEditTransformer3DModel", WAN, video),
    "cogvideox": Diffusion(
        "cogvideox_transformer_3d", "CogVideoXTransformer3DModel", COGVIDEO, _cogvideo
    ),
    "consisid": Diffusion(
        "consisid_transformer_3d",
        "ConsisIDTransformer3DModel",
        {**COGVIDEO, "is_train_face": False},
        _cogvideo,
    ),
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
    "hunyuan_video": Diffusion(
        "transformer_hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 8},
        _hunyuan,
    ),
    "hunyuan_video15": Diffusion(
        "transformer_hunyuan_video15",
        "HunyuanVideo15Transformer3DModel",
        {
            **HUNYUAN,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "target_size": 16,
            "task_type": "t2v",
        },
        _hunyuan15,
    ),
    "joyimage": Diffusion(
        "transformer_joyimage",
        "JoyImageEditTransformer3DModel",
        {
            **CHANNELS,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": list(AXES),
        },
        video,
    ),
    "kandinsky5": Diffusion(
        "transformer_kandinsky",
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 32,
            "out_visual_dim": 4,
            "patch_size": (1, 2, 2),
            "model_dim": 128,
            "ff_dim": 128,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": AXES,
        },
        _kandinsky,
        rounds="bfloat16",
    ),
    "ltx": Diffusion("transformer_ltx", "LTXVideoTransformer3DModel", LTX, _ltx),
    "ltx2": Diffusion("transformer_ltx2", "LTX2VideoTransformer3DModel", LTX2, _ltx2),
    "ltx2_split": Diffusion(
        "transformer_ltx2", "LTX2VideoTransformer3DModel", {**LTX2, "rope_type": "split"}, _ltx2
    ),
    "mochi": Diffusion(
        "transformer_mochi",
        "MochiTransformer3DModel",
        {
            **HEADS,
            "patch_size": 2,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 16,
        },
        lambda: video(text=16, encoder_attention_mask=all_true(1, 16)),
    ),
    "motif_video": Diffusion(
        "transformer_motif_video",
        "MotifVideoTransformer3DModel",
        {
            **HEADS,
            **CHANNELS,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_decoder_layers": 0,
            "patch_size": 1,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "norm_type": "layer_norm",
            "text_embed_dim": 32,
            "image_embed_dim": 4,
            "rope_axes_dim": AXES,
            "enable_text_cross_attention_dual": False,
            "enable_text_cross_attention_single": False,
        },
        lambda: video(width=32, frames=1, side=4),
    ),
    "sana_video": Diffusion(
        "transformer_sana_video",
        "SanaVideoTransformer3DModel",
        {
            **TWO_LAYERS,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 128,
            "caption_channels": 8,
            "mlp_ratio": 2.5,
            "sample_size": 8,
            "patch_size": (1, 2, 2),
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        lambda: video(width=8),
    ),
    "skyreels_v2": Diffusion("transformer_skyreels_v2", "SkyReelsV2Transformer3DModel", WAN, video),
    "stable_audio3": Diffusion(
        "transformer_stable_audio3",
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "embed_dim": 128,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 16,
            "global_cond_dim": 16,
            "local_add_cond_dim": 9,
            "num_memory_tokens": 4,
        },
        _audio,
    ),
    "wan": Diffusion("transformer_wan", "WanTransformer3DModel", WAN, video),
    "wan_vace": Diffusion(
        "transformer_wan_vace",
        "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0], "vace_in_channels": 8},
        lambda: video(control_hidden_states=noise(1, 8, 2, 8, 8)),
    ),
}
