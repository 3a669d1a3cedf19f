"""Sound models of diffusers: tiny sizes and inputs.

In: nothing. Out: `SOUNDS`, by name.
"""

from __future__ import annotations

from fxfuse.tiny.diffusion_inputs import all_true, time
from fxfuse.tiny.diffusion_unit import HEADS, TEXT, TWO_LAYERS, Arguments, Diffusion
from fxfuse.tiny.inputs import noise

FRAMES = 16  # of a latent sound


def _ace_step() -> Arguments:
    return {
        "hidden_states": noise(1, 2 * FRAMES, 4),
        "timestep": time(0.5),
        "timestep_r": time(0.25),
        "encoder_hidden_states": noise(1, TEXT, 32),
        "context_latents": noise(1, 2 * FRAMES, 8, seed=6),
    }


def _longcat() -> Arguments:
    return {
        "hidden_states": noise(1, FRAMES, 8),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "encoder_attention_mask": all_true(1, TEXT),
        "timestep": time(0.5),
        "attention_mask": all_true(1, FRAMES),
        "latent_cond": noise(1, FRAMES, 8, seed=6),
    }


def _minimax() -> Arguments:
    return {
        "hidden_states": noise(1, 4, FRAMES),
        "timestep": time(0.5),
        "encoder_hidden_states": noise(1, FRAMES, 16),
    }


def _stable_audio() -> Arguments:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    # Half of a head's channels turn; the global token comes first.
    turns = get_1d_rotary_pos_embed(16, 1 + FRAMES, use_real=True, repeat_interleave_real=False)
    return {
        "hidden_states": noise(1, 4, FRAMES),
        "timestep": time(0.5),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "global_hidden_states": noise(1, 1, 8),
        "rotary_embedding": turns,
    }


def _stable_audio3() -> Arguments:
    return {
        "hidden_states": noise(1, 8, 16),
        "timestep": time(0.5),
        "encoder_hidden_states": noise(1, TEXT, 16),
        "global_hidden_states": noise(1, 16),
    }


SOUNDS: dict[str, Diffusion] = {
    "ace_step": Diffusion(
        "ace_step_transformer",
        "AceStepTransformer1DModel",
        {
            "hidden_size": 128,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
            "encoder_hidden_size": 32,
        },
        _ace_step,
    ),
    "longcat_audio_dit": Diffusion(
        "transformer_longcat_audio_dit",
        "LongCatAudioDiTTransformer",
        {"dit_dim": 128, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 16, "latent_dim": 8},
        _longcat,
    ),
    "minimax_music3": Diffusion(
        "transformer_minimax_music3",
        "MiniMaxMusic3Transformer1DModel",
        {
            **HEADS,
            "in_channels": 4,
            "condition_dim": 16,
            "num_layers": 2,
            "ff_inner_dim": 64,
            "rotary_dim": 16,
            "fourier_embedding_dim": 32,
        },
        _minimax,
    ),
    "stable_audio": Diffusion(
        "stable_audio_transformer",
        "StableAudioDiTModel",
        {
            **TWO_LAYERS,
            "sample_size": FRAMES,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 64,
            "time_proj_dim": 32,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 16,
        },
        _stable_audio,
    ),
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
        _stable_audio3,
    ),
}
