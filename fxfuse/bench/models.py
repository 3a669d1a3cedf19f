"""Whole models with random weights, their configs written out as numbers: nothing is fetched.

A Model is a table entry; `made` builds it in bfloat16 on a device, cut to some depth.
"""

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Model:
    """A text model of transformers; `numbers` are its config's."""

    name: str
    config: str
    architecture: str
    numbers: Mapping[str, Any]


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta} | more


def _numbers(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, d: int, **more: Any
) -> dict[str, Any]:
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"num_key_value_heads": kv_heads, "head_dim": d} | more


_LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
_GEMMA = {
    "sliding_attention": _rope(1e4),
    "full_attention": _rope(1e6, rope_type="linear", factor=8.0),
}
_MROPE = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}

MODELS = {
    model.name: model
    for model in (
        Model(
            "Qwen3-0.6B",
            "Qwen3Config",
            "Qwen3ForCausalLM",
            _numbers(
                151936, 1024, 3072, 28, 16, 8, 128, max_position_embeddings=40960,
                rope_parameters=_rope(1e6), tie_word_embeddings=True,
            ),
        ),
        Model(
            "Qwen3-8B",
            "Qwen3Config",
            "Qwen3ForCausalLM",
            _numbers(
                151936, 4096, 12288, 36, 32, 8, 128, max_position_embeddings=40960,
                rope_parameters=_rope(1e6), tie_word_embeddings=False,
            ),
        ),
        # All layers full: the window of the others is the whole cache here.
        Model(
            "Gemma3-12B",
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            _numbers(
                262208, 3840, 15360, 48, 16, 8, 256, max_position_embeddings=131072,
                rope_parameters=_GEMMA, query_pre_attn_scalar=256,
            ),
        ),
        Model(
            "Llama-3.1-8B",
            "LlamaConfig",
            "LlamaForCausalLM",
            _numbers(
                128256, 4096, 14336, 32, 32, 8, 128, max_position_embeddings=131072,
                rope_parameters=_rope(5e5, **_LLAMA3), rms_norm_eps=1e-5,
                tie_word_embeddings=False,
            ),
        ),
        # The language part alone; it makes its three rows of positions itself.
        Model(
            "Qwen3-VL-8B",
            "Qwen3VLTextConfig",
            "Qwen3VLTextModel",
            _numbers(
                151936, 4096, 12288, 36, 32, 8, 128, max_position_embeddings=262144,
                rope_parameters=_rope(5e6, **_MROPE),
            ),
        ),
    )
}  # fmt: skip


@dataclasses.dataclass
class Logits:
    """The part of a model's output that is read here."""

    logits: Tensor


class Headed(nn.Module):
    """A body without a head, and a head."""

    def __init__(self, body: Any, config: Any) -> None:
        super().__init__()
        self.body, self.config = body, config
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False, dtype=torch.bfloat16
        )

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **kwargs: Any) -> Logits:
        hidden = self.body(input_ids=input_ids, **kwargs).last_hidden_state
        return Logits(self.lm_head(hidden[:, -logits_to_keep:]))


def made(model: Model, device: str, layers: int | None) -> Any:
    """The model with random weights in bfloat16, made on the device."""
    transformers = import_module("transformers")
    numbers = dict(model.numbers)
    if layers is not None:
        numbers["num_hidden_layers"] = layers
    if model.config == "Gemma3TextConfig":
        numbers["layer_types"] = ["full_attention"] * numbers["num_hidden_layers"]
    config = getattr(transformers, model.config)(**numbers)
    torch.manual_seed(0)
    with torch.device(device):
        made = getattr(transformers, model.architecture)._from_config(config, dtype=torch.bfloat16)
        whole = made if hasattr(made, "lm_head") else Headed(made, config)
    return spread(whole.requires_grad_(False).eval())


@torch.no_grad()
def spread(model: Any) -> Any:
    """Layers with outputs of unit variance, in place: as initialised, embeddings outweigh them."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.add_(0.2 * torch.randn_like(weight))
        elif "embed" not in name:
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


def flux(device: str, layers: int | None) -> tuple[Any, Callable[[int], dict[str, Tensor]], int]:
    """Flux's transformer at full width, its arguments by batch for 1024 x 1024, and its layers.

    Of the real 19 + 38 blocks `layers` + 2 `layers` are made, 2 + 4 unless asked.
    """
    # Its classes have no types.
    diffusers: Any = import_module("diffusers")

    depth = layers or 2
    with torch.device(device):
        model = diffusers.FluxTransformer2DModel(
            in_channels=64, num_layers=depth, num_single_layers=2 * depth, guidance_embeds=True
        ).to(torch.bfloat16)

    def arguments(batch: int) -> dict[str, Tensor]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).bfloat16()

        ids = torch.zeros(4096, 3, device=device)
        ids[:, 1] = torch.arange(4096, device=device) // 64
        ids[:, 2] = torch.arange(4096, device=device) % 64
        return {
            "hidden_states": draw(batch, 4096, 64),
            "encoder_hidden_states": draw(batch, 512, 4096),
            "pooled_projections": draw(batch, 768),
            "timestep": torch.full((batch,), 0.5, device=device).bfloat16(),
            "img_ids": ids,
            "txt_ids": torch.zeros(512, 3, device=device),
            "guidance": torch.full((batch,), 3.5, device=device).bfloat16(),
        }

    return model.requires_grad_(False).eval(), arguments, 3 * depth
