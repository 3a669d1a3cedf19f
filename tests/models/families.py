"""One entry for each model family: a tiny transformers config, and how many layers must fuse.

In: nothing. Out: `FAMILIES`, by name. Sizes differ between the families on purpose, so that no
head count, head dim or rotary width is right by accident. Every layer kind that a config knows
occurs at least once.

To add a family: one entry here. `rotary` is the number of attention layers that rotate q and k;
`stored` is how many of their sites include the KV-cache store when a static cache is passed.
`knows_float64` is false where torch's grouped matrix product (the experts) refuses float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """A model family: `model`, `config` name classes of transformers, `sizes` goes over SMALL."""

    name: str
    spelling: str
    model: str
    config: str
    rotary: int
    stored: int
    sizes: dict[str, Any] = field(default_factory=dict)
    through_inductor: bool = False
    knows_float64: bool = True

    def __str__(self) -> str:
        return self.name


# One layer of each kind first, so that two layers are enough.
SLIDING_AND_FULL = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
}

TABLE = [
    Family(
        "llama",
        "rotate_half over the whole head, no norm",
        "LlamaForCausalLM",
        "LlamaConfig",
        rotary=2,
        stored=2,
    ),
    Family(
        "qwen2",
        "biases on q, k and v",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        rotary=2,
        stored=2,
        sizes={"num_attention_heads": 6, "hidden_size": 144, "head_dim": 24},
    ),
    Family(
        "qwen3",
        "RMSNorm of q and k over the head, then RoPE",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        rotary=2,
        stored=2,
        through_inductor=True,
    ),
    Family(
        "gemma3",
        "RMSNorm with 1 + w, two table sets, sliding and full layers",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        rotary=2,
        stored=2,
        sizes={**SLIDING_AND_FULL, "query_pre_attn_scalar": 24, "num_key_value_heads": 1},
    ),
    Family(
        "olmo2",
        "RMSNorm over the whole projection width, before the reshape",
        "Olmo2ForCausalLM",
        "Olmo2Config",
        rotary=2,
        stored=2,
        sizes={"num_key_value_heads": 4, "head_dim": None},
    ),
    Family(
        "gpt_neox",
        "packed q, k, v; a quarter of the head rotates",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        rotary=2,
        stored=2,
        sizes={"num_attention_heads": 3, "hidden_size": 120, "rotary_pct": 0.25},
    ),
    Family(
        "phi3",
        "packed q, k, v, split; the slice and cat of a partial rotation that is whole",
        "Phi3ForCausalLM",
        "Phi3Config",
        rotary=2,
        stored=2,
    ),
    Family(
        "phi3_partial",
        "as phi3, three quarters of the head rotate (Phi-4-mini)",
        "Phi3ForCausalLM",
        "Phi3Config",
        rotary=2,
        stored=2,
        sizes={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
            }
        },
    ),
    Family(
        "glm4",
        "even/odd pairs, half of the head rotates",
        "Glm4ForCausalLM",
        "Glm4Config",
        rotary=2,
        stored=2,
    ),
    Family(
        "cohere2",
        "even/odd pairs in float32; full layers do not rotate",
        "Cohere2ForCausalLM",
        "Cohere2Config",
        rotary=2,
        stored=2,
        sizes={
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 64,
        },
    ),
    Family(
        "gptj",
        "even/odd pairs, half-width tables, [B, T, H, D] at the rotation, permuted after it",
        "GPTJForCausalLM",
        "GPTJConfig",
        rotary=2,
        stored=2,
        sizes={"n_embd": 96, "n_layer": 2, "n_head": 3, "n_positions": 256, "rotary_dim": 12},
    ),
    Family(
        "gpt_oss",
        "sub/add of halves and cat, half-width tables, biases, experts",
        "GptOssForCausalLM",
        "GptOssConfig",
        rotary=2,
        stored=2,
        sizes={
            **SLIDING_AND_FULL,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "num_attention_heads": 8,
            "head_dim": 16,
        },
        knows_float64=False,
    ),
    Family(
        "llama4",
        "complex multiply, L2 norm after it; the third layer does not rotate",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        rotary=2,
        stored=2,
        sizes={
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 1, 0],
            "intermediate_size_mlp": 192,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
    ),
    Family(
        "deepseek_v3",
        "MLA: the rotated part is cat'ed with the rest and cached in the values' slot",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        rotary=2,
        stored=2,
        sizes={
            "num_key_value_heads": 4,
            "head_dim": None,
            "q_lora_rank": 48,
            "kv_lora_rank": 40,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 24,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 64,
        },
        knows_float64=False,
    ),
    Family(
        "hunyuan",
        "RMSNorm of q and k after the rotation",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanDenseV1Config",
        rotary=2,
        stored=2,
    ),
    Family(
        "nanochat",
        "rotates the other way; RMSNorm without weight after the rotation",
        "NanoChatForCausalLM",
        "NanoChatConfig",
        rotary=2,
        stored=2,
        sizes={"num_key_value_heads": 4, "hidden_size": 160, "head_dim": 40},
    ),
]

FAMILIES = {family.name: family for family in TABLE}
