"""A unit's inputs: by the names of its forward's parameters, or by its own entry here.

In: a unit's name, its model and the number of tokens. Out: keyword arguments of float32 and integer
tensors. A generative model is called with `PROMPT` tokens, then with one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxfuse.tiny.sizes import VOCAB, WIDTH

BATCH, PROMPT = 2, 7

Inputs = dict[str, Any]
ENCODED = 5  # tokens that an encoder is said to have made


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, below: int = 100, seed: int = 1) -> Tensor:
    """Token ids; the first four stay out, they mean padding, begin, end and unknown."""
    low = min(4, below - 1)
    return torch.randint(low, below, shape, generator=torch.Generator().manual_seed(seed))


def two_images() -> Tensor:
    """Patches of two images, as rows of (frames, height, width): 48 in all."""
    return torch.tensor([[1, 4, 4], [1, 4, 8]])


PATCHES = 48


def only(value: Any) -> Any:
    """The first of a list of sizes, or the size itself."""
    return value[0] if isinstance(value, (list, tuple)) else value


def inputs_of(name: str, model: Any, tokens: int = PROMPT) -> Inputs:
    """Inputs of a transformers unit."""
    if name in OWN:
        return OWN[name](model.config, tokens)
    parameters = inspect.signature(model.forward).parameters
    for wanted, rule in RULES.items():
        if wanted in parameters:
            return rule(model.config, tokens, parameters)
    raise LookupError(f"no rule for the inputs {', '.join(parameters)}")


def _token_ids(config: Any, tokens: int, parameters: Mapping[str, inspect.Parameter]) -> Inputs:
    text = config.get_text_config(decoder=True)
    below = max(5, min(getattr(text, "vocab_size", None) or VOCAB, 100))
    inputs: Inputs = {"input_ids": ids(BATCH, tokens, below=below, seed=tokens)}
    encoded = parameters.get("encoder_hidden_states")
    if encoded is not None and encoded.default is inspect.Parameter.empty:
        inputs["encoder_hidden_states"] = noise(BATCH, ENCODED, WIDTH)
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids(BATCH, tokens, below=below, seed=2)
    return inputs


def _embeddings(config: Any, tokens: int, _: object) -> Inputs:
    width = getattr(config, "hidden_size", WIDTH)
    return {"inputs_embeds": noise(BATCH, tokens, width, seed=tokens)}


def _packed_patches(config: Any, _: int, parameters: Mapping[str, inspect.Parameter]) -> Inputs:
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    frames = only(getattr(config, "temporal_patch_size", 1) or 1)
    row = channels * frames * only(getattr(config, "patch_size", 14)) ** 2
    pixels = "hidden_states" if "hidden_states" in parameters else "pixel_values"
    grid = "grid_thw" if "grid_thw" in parameters else "image_grid_thw"
    return {pixels: noise(PATCHES, row), grid: two_images()}


def _image(config: Any, *_: object) -> Inputs:
    size = getattr(config, "image_size", 32)
    if not isinstance(size, int):
        size = min(only(size or 32), 4 * only(getattr(config, "patch_size", 16) or 16))
    return {"pixel_values": noise(1, getattr(config, "num_channels", 3) or 3, size, size)}


def _features(config: Any, *_: object) -> Inputs:
    names = ("num_mel_bins", "feature_size", "input_feat_per_channel")
    width = next((w for name in names if (w := getattr(config, name, None))), 80)
    return {"input_features": noise(1, 64, width)}


def _samples(_: Any, __: int, parameters: Mapping[str, inspect.Parameter]) -> Inputs:
    return {"input_values": noise(1, 1, 3840) if "padding_mask" in parameters else noise(1, 3200)}


def _hidden_states(config: Any, *_: object) -> Inputs:
    return {"hidden_states": noise(BATCH, PROMPT, getattr(config, "hidden_size", WIDTH))}


# The first parameter that a forward has decides.
RULES: dict[str, Callable[[Any, int, Mapping[str, inspect.Parameter]], Inputs]] = {
    "input_ids": _token_ids,
    "inputs_embeds": _embeddings,
    "grid_thw": _packed_patches,
    "image_grid_thw": _packed_patches,
    "pixel_values": _image,
    "input_features": _features,
    "input_values": _samples,
    "hidden_states": _hidden_states,
}


def _embedded(_: Any, tokens: int) -> Inputs:
    return {"inputs_embeds": noise(BATCH, tokens, WIDTH, seed=8 + tokens)}


def _timed(_: Any, tokens: int) -> Inputs:
    return {**_embedded(_, tokens), "t_cond": noise(1, WIDTH)}


def _decoder(_: Any, tokens: int) -> Inputs:
    return {
        "input_ids": ids(BATCH, tokens, seed=tokens),
        "encoder_hidden_states": noise(BATCH, ENCODED, WIDTH),
    }


def _dia(config: Any, tokens: int) -> Inputs:
    return {
        "input_ids": ids(BATCH, tokens, config.num_channels, below=50),
        "encoder_hidden_states": noise(BATCH, ENCODED, getattr(config, "cross_hidden_size", WIDTH)),
    }


def _codebooks(count: int) -> Callable[[Any, int], Inputs]:
    return lambda _, tokens: {"input_ids": ids(BATCH, tokens, count, below=30, seed=2)}


def _talker(config: Any, tokens: int) -> Inputs:
    width = getattr(config, "embedding_size", WIDTH)
    return {"inputs_embeds": noise(BATCH, tokens, width, seed=3)}


def _image_patches(config: Any, _: int) -> Inputs:
    side, channels = only(config.patch_size), getattr(config, "num_channels", None) or 3
    return {"pixel_values": noise(PATCHES, channels, side, side), "grid_thw": two_images()}


def _frame_pairs(config: Any, _: int) -> Inputs:
    channels: Any = getattr(config, "num_channels", None) or getattr(config, "in_channels", 3)
    row = 2 * channels * only(config.patch_size) ** 2
    return {"pixel_values": noise(PATCHES, row), "grid_thw": two_images()}


def _merged(config: Any, _: int) -> Inputs:
    pixels = noise(PATCHES, 3 * only(config.patch_size) ** 2)
    merge = torch.tensor([2, 2])
    return {"pixel_values": pixels, "grid_thw": two_images(), "merge_sizes": merge}


def _paddle(config: Any, _: int) -> Inputs:
    side = only(config.patch_size)
    return {"pixel_values": noise(1, PATCHES, 3, side, side), "grid_thw": two_images()}


def _positioned(config: Any, _: int) -> Inputs:
    side = torch.arange(6)
    positions = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    return {
        "pixel_values": noise(1, 36, 3 * config.patch_size**2),
        "pixel_position_ids": positions.reshape(1, 36, 2),
    }


def _idefics(config: Any, tokens: int) -> Inputs:
    side = config.vision_config.image_size
    return {
        "input_ids": ids(BATCH, tokens),
        "pixel_values": noise(BATCH, 1, 3, side, side),
        "image_attention_mask": torch.ones(BATCH, tokens, 1),
    }


OWN: dict[str, Callable[[Any, int], Inputs]] = {
    "csm.backbone": _codebooks(4),
    "dia.decoder": _dia,
    "efficientloftr": lambda *_: {"pixel_values": noise(1, 2, 3, 64, 64)},
    "gemma4.vision": _positioned,
    "glmasr": lambda config, _: {"input_features": noise(1, config.num_mel_bins, 64)},
    "idefics.lm": _idefics,
    "kimi_k25": _image_patches,
    "kyutai_speech_to_text": _codebooks(5),
    "mimi.encoder": lambda *_: {"input_values": noise(1, 1, 3840)},
    "mimi.mimi": lambda *_: {"input_values": noise(1, 1, 3840)},
    "molmo2.vision": lambda *_: {"pixel_values": noise(1, 16, 588)},
    "moonshine.decoder": _decoder,
    "moonshine_streaming.decoder": _decoder,
    "muse_glimmer.vision": _frame_pairs,
    "muse_glimmer_assistant": lambda *_: {
        "noise_embeds": noise(1, 4, WIDTH),
        "context_hidden_states": noise(1, 7, WIDTH),
        "use_cache": False,
    },
    "muse_spark.audio": lambda *_: {"input_values": noise(1, 3840)},
    "muse_spark.vision": _frame_pairs,
    "paddleocr_vl.vision": _paddle,
    "qwen2_5_omni.talker": _talker,
    "qwen3_omni_moe.qwen3omnimoecode2wav": _embedded,
    "qwen3_omni_moe.qwen3omnimoetalkertext": _embedded,
    "qwen3_omni_moe.talker": _embedded,
    "t5gemma2.decoder": _decoder,
    "timesfm2_5": lambda *_: {
        "past_values": noise(2, 64),
        "past_values_padding": torch.zeros(2, 64, dtype=torch.int64),
    },
    "unlimited_ocr.unlimitedocrvisionencoder": lambda config, _: {
        "patch_embeds": noise(1, config.hidden_size, 4, 4)
    },
    "video_llama_3": _merged,
    "vjepa2": lambda *_: {
        "pixel_values_videos": noise(1, 4, 3, 32, 32),
        "skip_predictor": True,
    },
    "voxtral_realtime.text": _timed,
    "wav2vec2_bert": lambda *_: {"input_features": noise(1, 32, 160)},
}
