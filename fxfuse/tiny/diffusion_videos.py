"""Video models of diffusers: tiny sizes and inputs.

In: nothing. Out: `VIDEOS`, by name.
"""

from __future__ import annotations

import torch

from fxfuse.tiny.diffusion_inputs import all_true, time, video
from fxfuse.tiny.diffusion_unit import AXES, CHANNELS, HEADS, TEXT, TWO_LAYERS, Arguments, Diffusion
from fxfuse.tiny.inputs import noise

ALLEGRO: Arguments = {
    **TWO_LAYERS,
    "attention_head_dim": 24,  # channels of three axes, each in halves
    "cross_attention_dim": 96,
    "caption_channels": 16,
    "sample_height": 8,
    "sample_width": 8,
    "sample_frames": 2,
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


def _allegro() -> Arguments:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, side = 2, 4
    area = ((0, 0), (side, side))
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(24, area, (side, side), frames)
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).T[:, None]
    mask = torch.ones(1, TEXT)
    return video(encoder_attention_mask=mask, image_rotary_emb=(tuple(tables), tuple(positions)))


def _hunyuan() -> Arguments:
    return video(
        frames=1,
        side=4,
        pooled_projections=noise(1, 8),
        encoder_attention_mask=torch.ones(1, TEXT),
        guidance=time(1000.0),
    )


def _framepack() -> Arguments:
    """One frame, and a history of seven that is kept at three resolutions."""
    return {
        **video(frames=1, pooled_projections=noise(1, 8), guidance=time(1000.0)),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "image_embeds": noise(1, 3, 12),
        "indices_latents": torch.tensor([7]),
        "latents_clean": noise(1, 4, 1, 8, 8),
        "indices_latents_clean": torch.tensor([6]),
        "latents_history_2x": noise(1, 4, 2, 8, 8),
        "indices_latents_history_2x": torch.tensor([4, 5]),
        "latents_history_4x": noise(1, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(4),
    }


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


def _minimax() -> Arguments:
    """Tokens of text, of sound and of two frames of 2 x 2, in one sequence."""
    text, sound, frames = torch.arange(4), torch.arange(4, 10), torch.arange(10, 18)
    tags = torch.tensor([1] * 4 + [2] * 6 + [0] * 8)
    positions = torch.arange(18.0)[:, None].repeat(1, 3)
    positions[frames] = 10 + torch.cartesian_prod(*[torch.arange(2.0)] * 3)
    return {
        "hidden_states": noise(1, 8, 16),
        "audio_hidden_states": noise(1, 6, 6),
        "encoder_hidden_states": noise(1, 4, 16),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": frames,
        "audio_indices": sound,
        "text_indices": text,
    }


VIDEOS: dict[str, Diffusion] = {
    "allegro": Diffusion("transformer_allegro", "AllegroTransformer3DModel", ALLEGRO, _allegro),
    "cogvideox": Diffusion(
        "cogvideox_transformer_3d", "CogVideoXTransformer3DModel", COGVIDEO, _cogvideo
    ),
    "consisid": Diffusion(
        "consisid_transformer_3d",
        "ConsisIDTransformer3DModel",
        {**COGVIDEO, "is_train_face": False},
        _cogvideo,
    ),
    "easyanimate": Diffusion(
        "transformer_easyanimate",
        "EasyAnimateTransformer3DModel",
        {
            **TWO_LAYERS,
            "mmdit_layers": 1,
            "patch_size": 2,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
        },
        video,
    ),
    "hunyuan_video": Diffusion(
        "transformer_hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 8},
        _hunyuan,
    ),
    "hunyuan_video_framepack": Diffusion(
        "transformer_hunyuan_video_framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **HUNYUAN,
            "num_layers": 1,
            "num_single_layers": 1,
            "patch_size": 2,
            "pooled_projection_dim": 8,
            "image_proj_dim": 12,
            "has_image_proj": True,
            "has_clean_x_embedder": True,
        },
        _framepack,
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
    "ltx": Diffusion("transformer_ltx", "LTXVideoTransformer3DModel", LTX, _ltx),
    "ltx2": Diffusion("transformer_ltx2", "LTX2VideoTransformer3DModel", LTX2, _ltx2),
    "ltx2_split": Diffusion(
        "transformer_ltx2", "LTX2VideoTransformer3DModel", {**LTX2, "rope_type": "split"}, _ltx2
    ),
    "minimax_h3": Diffusion(
        "transformer_minimax_h3",
        "MiniMaxH3Transformer3DModel",
        {
            **HEADS,
            "hidden_size": 96,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 64,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 4,
        },
        _minimax,
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
}
