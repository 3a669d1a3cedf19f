"""What the rules of sizes.py cannot know about a unit's config.

In: nothing. Out: `OVERRIDES`, config fields by unit. Sections of multi-axis rotary embeddings must
add up to half of the rotary width of the tiny head.
"""

from __future__ import annotations

from typing import Any

from fxfuse.tiny.sizes import HEAD_DIM, HEADS, KV_HEADS, UNSET, VOCAB, WIDTH

HALF = HEAD_DIM // 2


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **parameters}


def sections(total: int, axes: int = 3) -> list[int]:
    """`total` pairs shared out over the axes; the first takes the remainder."""
    return [total - (axes - 1) * (total // axes), *[total // axes] * (axes - 1)]


SECTIONED = {"rope_parameters": rope(mrope_section=sections(HALF))}
INTERLEAVED = {"rope_parameters": rope(mrope_section=sections(HALF), mrope_interleaved=True)}
QUARTER = {
    "rope_parameters": rope(
        mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25
    )
}
HALF_WIDTH = {"rope_parameters": rope(mrope_section=sections(HALF // 2), partial_rotary_factor=0.5)}
UNGROUPED = {"num_key_value_heads": HEADS}
WIDE_GLOBAL_HEADS = {"global_head_dim": 2 * HEAD_DIM}
CODEC = {
    "upsample_groups": WIDTH,
    "num_filters": 8,
    "num_quantizers": 4,
    "num_semantic_quantizers": 1,
    "codebook_size": 64,
    "codebook_dim": 32,
    "vector_quantization_hidden_dimension": 32,
}
FLOW_HEAD = {"flow_head_config": {"condition_dim": WIDTH}}
MOONSHINE = {
    "encoder_num_key_value_heads": HEADS,
    "decoder_num_key_value_heads": HEADS,
    "num_key_value_heads": HEADS,
}

TEXT: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere.qknorm": {"use_qk_norm": True},
    "cohere_compass": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": rope(mrope_section=sections(HALF)),
            "full_attention": rope(mrope_section=sections(HALF)),
        },
    },
    "cosmos3_edge.text": SECTIONED,
    "csm": {"num_codebooks": 32, "backbone_hidden_size": WIDTH},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": KV_HEADS, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": WIDTH,
            "ffn_hidden_size": 64,
            "moe_num_experts": 4,
            "moe_top_k": 4,
        },
    },
    "deepseek_ocr2.text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 4},
    "deepseek_v2": {"num_experts_per_tok": 4},
    "deepseek_v3.nointerleave": {"rope_interleave": False},
    "diffusion_gemma": {
        **WIDE_GLOBAL_HEADS,
        "num_experts": 4,
        "top_k_experts": 4,
        "moe_intermediate_size": 64,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 4},
    "dots3_note": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 64,
        "swa_kv_lora_rank": 64,
        "swa_head_dim": HEAD_DIM + HALF,
        "swa_qk_nope_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
        "head_dim": HEAD_DIM + HALF,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "embedding_gemma2": {
        **WIDE_GLOBAL_HEADS,
        "num_global_key_value_heads": 1,
        "embedding_dim": WIDTH,
    },
    "ernie4_5_vl_moe.text": {
        "moe_intermediate_size": [64, 64],
        "rope_parameters": rope(mrope_section=[HALF // 3, HALF // 3, HALF - 2 * (HALF // 3)]),
    },
    "gemma4": WIDE_GLOBAL_HEADS,
    "gemma4_unified": WIDE_GLOBAL_HEADS,
    "glm4_moe.qknorm": {"use_qk_norm": True},
    "glm4v.text": HALF_WIDTH,
    "glm4v_moe.text": HALF_WIDTH,
    "glm5_next.text": {
        "qk_rope_head_dim": 0,
        "num_key_value_heads": HEADS,
        "index_kpool": 16,
        "index_topk": 64,
    },
    "glm_image.text": SECTIONED,
    "glm_ocr.text": {
        "rope_parameters": rope(mrope_section=sections(HALF), partial_rotary_factor=1.0)
    },
    "gradium_phonon_tts": FLOW_HEAD,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "position_embedding_type": "rope",
        "num_hidden_layers": 2,
    },
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "hunyuan_vl.text": {
        "head_dim": HEAD_DIM,
        "rope_parameters": rope(mrope_section=sections(HALF, 4)),
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": HALF},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM},
    "paddleocr_vl.text": SECTIONED,
    "phi.qknorm": {"qk_layernorm": True},
    "qwen2_5_omni.talker": {**SECTIONED, "embedding_size": WIDTH},
    "qwen2_5_omni.text": SECTIONED,
    "qwen2_5_vl.text": SECTIONED,
    "qwen2_vl.text": SECTIONED,
    "qwen3.sliding": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3_5": QUARTER,
    "qwen3_5_moe": QUARTER,
    "qwen3_omni_moe.qwen3omnimoetalkertext": {
        **INTERLEAVED,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_omni_moe.text": INTERLEAVED,
    "qwen3_vl.text": INTERLEAVED,
    "qwen3_vl_moe.text": INTERLEAVED,
    "qwen4_exp": {
        **QUARTER,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 128,
        "hc_lowrank": 16,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 64},
    "stablelm.qknorm": {"qk_layernorm": True},
    "step3p7.text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "sliding_window": 64,
        "mlp_layer_types": ["dense", "sparse"],
        "num_sliding_attention_heads": HEADS,
        "share_expert_dim": 64,
    },
    "t5gemma2.decoder": {"dropout_rate": 0.0},
    "t5gemma2.text": {"dropout_rate": 0.0},
    "zamba2": {"use_mem_rope": True},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}

TOWERS: dict[str, dict[str, Any]] = {
    "chameleon.lm": {"vocabulary_map": {"<image>": VOCAB - 1, "IMGIMGA": VOCAB - 2}},
    "clvp.encoder": {"projection_dim": WIDTH},
    "dots3_note.audio": {"adapter_input_size": WIDTH},
    "efficientloftr": {
        "hidden_size": UNSET,
        "num_key_value_heads": UNSET,
        "num_attention_heads": UNSET,
    },
    "esm": {
        "vocab_size": VOCAB,
        "position_embedding_type": "rotary",
        "pad_token_id": 1,
        "mask_token_id": 4,
        "token_dropout": False,
    },
    "kyutai_speech_to_text": {"codec_config": CODEC, "codebook_vocab_size": 40},
    "llama4.vision": {
        "intermediate_size": 4 * WIDTH,
        "projector_input_dim": WIDTH,
        "projector_output_dim": WIDTH,
        "vision_output_dim": WIDTH,
    },
    "mimi.decoder": CODEC,
    "mimi.encoder": CODEC,
    "mimi.mimi": CODEC,
    "moonshine": MOONSHINE,
    "moonshine.decoder": MOONSHINE,
    "moonshine_streaming.decoder": UNGROUPED,
    "moshi.lm": {"depth_decoder_config": {"input_size": WIDTH, "num_codebooks": 4}},
    "paddleocr_vl.vision": {"image_size": 56, "patch_size": 14},
    "pocket_tts": FLOW_HEAD,
    "sapiens2": {"image_size": [64, 64]},
    "vjepa2": {
        "crop_size": 32,
        "frames_per_clip": 4,
        "pred_hidden_size": WIDTH,
        "pred_num_attention_heads": HEADS,
        "pred_num_hidden_layers": 2,
    },
    "wav2vec2_bert": {"position_embeddings_type": "rotary"},
    "wav2vec2_conformer": {"position_embeddings_type": "rotary"},
}

OVERRIDES = TEXT | TOWERS
