"""A tiny config of any config class: the rules that need no knowledge of the model.

In: a config class and a unit's own values (overrides.py). Out: keyword arguments. Sizes
shrink by the name of their field, and of layers that differ one of each kind is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

HEADS, KV_HEADS, HEAD_DIM, VOCAB, POSITIONS = 4, 2, 32, 160, 256
WIDTH = HEADS * HEAD_DIM
# An override of this value leaves the field to the class's default.
UNSET: Any = object()

# Field names by the value they get.
FIXED: list[tuple[int, str]] = [
    (
        WIDTH,
        """hidden_size d_model n_embd embed_dim model_dim encoder_hidden_size attention_hidden_size
        lm_hidden_size decoder_hidden_size text_hidden_size hidden_dim encoder_embed_dim d_llm
        projection_hidden_size dim out_hidden_size rnn_width lru_width block_dim patch_embed_dim
        conv_dim""",
    ),
    (
        2 * WIDTH,
        """intermediate_size ffn_dim n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim
        shared_intermediate_size feed_forward_size intermediate_size_mlp block_ff_dim
        mlp_hidden_size d_ff expert_ffn_hidden_size dense_intermediate_size
        shared_expert_intermediate_size ffn_embed_dim""",
    ),
    (
        64,
        """moe_intermediate_size moe_shared_expert_intermediate_size moe_ffn_hidden_size expert_dim
        expert_intermediate_size q_lora_rank kv_lora_rank o_lora_rank qk_latent_dim index_topk
        num_position_embeddings""",
    ),
    (
        HEADS,
        """num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads
        attention_heads encoder_num_attention_heads decoder_num_attention_heads n_heads num_q_heads
        swa_num_attention_heads linear_num_heads""",
    ),
    (
        KV_HEADS,
        """num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads num_kv_heads
        n_kv_heads num_global_key_value_heads swa_num_key_value_heads num_key_value_heads_swa
        multi_query_group_num""",
    ),
    (
        HEAD_DIM,
        """head_dim kv_channels attention_head_dim swa_head_dim global_head_dim v_head_dim
        qk_nope_head_dim swa_v_head_dim head_dim_swa attention_head_size query_pre_attn_scalar""",
    ),
    (HEAD_DIM // 2, "qk_rope_head_dim rotary_dim index_head_dim"),
    (HEAD_DIM + HEAD_DIM // 2, "qk_head_dim"),
    (
        2,
        """num_hidden_layers n_layer num_layers encoder_layers decoder_layers depth n_layers
        encoder_num_hidden_layers decoder_num_hidden_layers num_encoder_layers
        num_decoder_layers""",
    ),
    (VOCAB, "vocab_size vocab_size_per_layer_input encoder_vocab_size audio_vocab_size"),
    (VOCAB, "text_vocab_size"),
    (
        POSITIONS,
        """max_position_embeddings n_positions max_sequence_length seq_length max_seq_len
        model_max_length n_ctx max_target_positions max_source_positions""",
    ),
    (16, "laurel_rank mamba_d_state mamba_chunk_size ssm_state_size"),
    (8, "mamba_n_heads mamba_num_heads"),
    (32, "mamba_d_head mamba_head_dim mamba_headdim linear_key_head_dim linear_value_head_dim"),
    (32, "block_multiple_of"),
    (2, "mamba_expand n_mamba_heads linear_num_key_heads index_n_heads"),
    (4, "linear_num_value_heads num_codebooks"),
    (1, "mamba_ngroups n_groups mamba_n_groups"),
    (256, "mamba_d_ssm"),
    (0, "num_kv_shared_layers pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    (3, "unk_token_id"),
]

# As FIXED, for fields that switch something off where they are zero or empty. Every expert is
# chosen, so that no rounding can choose another one.
UNLESS_OFF: list[tuple[int, str]] = [
    (
        4,
        """num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts
        zero_expert_num n_experts ffn_num_experts num_experts_per_tok moe_k moe_top_k moe_topk
        num_experts_per_token top_k_experts experts_per_token num_selected_experts""",
    ),
    (
        1,
        """n_group topk_group num_expert_groups topk_groups num_limited_groups n_shared_experts
        num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers
        moe_layer_start_index num_nextn_predict_layers mtp_num_hidden_layers num_mtp_layers""",
    ),
    (
        64,
        """sliding_window attention_window attention_chunk_size local_attention
        sliding_window_size""",
    ),
    (16, "hidden_size_per_layer_input"),
]


def _by_name(table: list[tuple[int, str]]) -> dict[str, int]:
    return {name: value for value, names in table for name in names.split()}


_FIXED, _UNLESS_OFF = _by_name(FIXED), _by_name(UNLESS_OFF)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "depth", "n_layers")
# Lists whose entries are not sizes of layers.
KEPT_LISTS = ("image_size", "conv_dim")
MOST_KINDS = 4


def tiny_sizes(config: Any, own: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments for a tiny `config` (a class); `own` goes over what the rules say.

    A dict in `own` under the name of a sub-config goes over the sizes of that sub-config.
    """
    own = own or {}
    default = config()
    fields = _fields(config, default)
    parts = _sub_configs(config)
    sizes = {name: _small(name, value) for name, value in fields.items() if name not in parts}
    sizes = {name: value for name, value in sizes.items() if value is not UNSET}
    for name in fields.keys() & parts:
        part = _read(default, name)
        if part is not None and not isinstance(part, dict):
            sizes[name] = type(part)(**_sizes_of_part(type(part), own.get(name)))
    if "kv_lora_rank" in fields and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = HEADS  # every head has a k of its own
    sizes |= _one_layer_of_each_kind(default, fields)
    sizes |= _small_image(sizes, fields)
    sizes |= {k: v for k, v in own.items() if not (k in parts and isinstance(v, dict))}
    return {name: value for name, value in sizes.items() if value is not UNSET}


def tiny_config(config: Any, own: dict[str, Any] | None = None) -> Any:
    """A config built from `tiny_sizes`, without the sizes that the class refuses."""
    sizes = tiny_sizes(config, own)
    for repair in (_ungrouped, _without_unknown):
        for _ in range(MOST_KINDS):
            try:
                return config(**sizes)
            except Exception as error:
                repaired = repair(sizes, error)
                if repaired is None:
                    break
                sizes = repaired
    return config(**sizes)


def _ungrouped(sizes: dict[str, Any], error: Exception) -> dict[str, Any] | None:
    """A class that validates its heads and knows no grouped queries."""
    grouped = sizes.get("num_key_value_heads", HEADS) != HEADS
    named = "num_key_value_heads" in str(error) or "grouped" in str(error)
    return sizes | {"num_key_value_heads": HEADS} if grouped and named else None


def _without_unknown(sizes: dict[str, Any], error: Exception) -> dict[str, Any] | None:
    _, found, rest = str(error).partition("unexpected keyword argument '")
    unknown = rest.partition("'")[0]
    if not (found and isinstance(error, TypeError) and unknown in sizes):
        return None
    return {k: v for k, v in sizes.items() if k != unknown}


def _sizes_of_part(config: Any, own: dict[str, Any] | None) -> dict[str, Any]:
    try:
        return tiny_sizes(config, own)
    except Exception:  # a sub-config that no default builds keeps its own sizes
        return {}


def _sub_configs(config: Any) -> dict[str, Any]:
    parts = getattr(config, "sub_configs", None)
    return parts if isinstance(parts, dict) else {}


def _fields(config: Any, default: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(config):
        return dict(vars(default))
    return {f.name: _read(default, f.name, f.default) for f in dataclasses.fields(config)}


def _read(default: Any, name: str, otherwise: Any = None) -> Any:
    try:
        return getattr(default, name, otherwise)
    except Exception:  # a field that has one value for each layer refuses to be read as a whole
        return otherwise


def _small(name: str, value: Any) -> Any:
    """The tiny value of one field, UNSET where the default may stay."""
    if value is None or isinstance(value, bool):
        return UNSET
    if rule := _rule(name):
        if isinstance(value, (int, float)):
            return rule(value)
        if isinstance(value, (list, tuple)) and _are_ints(value) and name not in KEPT_LISTS:
            return type(value)(rule(x) for x in value)
        return rule(value) if name.endswith("token_id") else UNSET
    special = name.endswith(("_token_id", "_token_index"))
    if special and isinstance(value, int) and value >= VOCAB:
        return VOCAB - 1 - sum(map(ord, name)) % 40  # the last ids, a different one for most names
    if name == "chunk_size" and isinstance(value, int):
        return min(value, 16)
    return UNSET


def _rule(name: str) -> Callable[[Any], Any] | None:
    if name in _FIXED:
        return lambda _: _FIXED[name]
    if name in _UNLESS_OFF:
        return lambda value: _UNLESS_OFF[name] if value else value
    return None


def _are_ints(values: Any) -> bool:
    return bool(values) and all(type(x) is int for x in values)


def _one_layer_of_each_kind(default: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The lists with one entry for each layer, cut to the first layer of every combination."""
    count = next((n for n in LAYER_COUNTS if n in fields), "num_hidden_layers")
    layers = _read(default, count)
    if type(layers) is not int or layers < 2:
        return {}
    lists = {
        name: values
        for name in sorted(fields)
        if isinstance(values := _read(default, name), (list, tuple)) and len(values) == layers
    }
    if not lists:
        return {}
    first: dict[tuple[str, ...], int] = {}
    for layer in range(layers):
        first.setdefault(tuple(str(v[layer]) for v in lists.values()), layer)
    kept = list(first.values())[:MOST_KINDS]
    kept = sorted(kept if len(kept) > 1 else [kept[0], next(i for i in (0, 1) if i != kept[0])])
    cut = {name: _small_entries(name, [v[i] for i in kept]) for name, v in lists.items()}
    return cut | {count: len(kept)}


def _small_entries(name: str, values: list[Any]) -> list[Any]:
    rule = _rule(name)
    return [rule(v) for v in values] if rule and _are_ints(values) else values


def _small_image(sizes: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    patch, image = sizes.get("patch_size", fields.get("patch_size")), fields.get("image_size")
    if type(patch) is not int or type(image) is not int or image <= 4 * patch:
        return {}
    return {"image_size": 4 * patch}
