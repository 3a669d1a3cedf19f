"""A unit's tiny model, and the caches that it takes.

In: a Unit. Out: the model, with scaled_dot_product_attention where it knows that.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.tiny.overrides import OVERRIDES
from fxfuse.tiny.sizes import tiny_config
from fxfuse.tiny.units import Unit

# Cache classes that a module's models have for themselves; these refuse the library's.
OWN_CACHE = {"transformers.models.minimax.modeling_minimax": "MiniMaxCache"}


def tiny_model(unit: Unit) -> nn.Module:
    """The model with scaled_dot_product_attention, or with the eager form where it has no other."""
    model = unit.model_class()
    for attention in ("sdpa", "eager"):
        config = tiny_config(model.config_class, OVERRIDES.get(unit.name))
        config._attn_implementation = attention
        torch.manual_seed(0)
        try:
            made: nn.Module = model(config)
            return made
        except ValueError as error:
            if attention == "eager" or not re.search(r"sdpa|attention|scaled_dot", str(error)):
                raise
    raise AssertionError("unreachable")


def takes_cache(model: nn.Module) -> bool:
    """Whether a model generates with a KV cache."""
    names = inspect.signature(model.forward).parameters.keys()
    return "past_key_values" in names and bool(names & {"input_ids", "inputs_embeds"})


def why_no_static_cache(model: nn.Module) -> str:
    """Why a model takes no static cache, or nothing."""
    own = OWN_CACHE.get(type(model).__module__)
    return f"the model has {own}" if own else ""


def new_cache(model: Any, kind: str, slots: int, inputs: Mapping[str, Any]) -> Any:
    """An empty cache, "static" with so many slots or "dynamic"; of the model's own class where it
    takes no other, and with one for the encoder's tokens where there are any.
    """
    if own := OWN_CACHE.get(type(model).__module__):
        return getattr(sys.modules[type(model).__module__], own)()
    transformers = importlib.import_module("transformers")
    cache: Any
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=slots)
    else:
        cache = transformers.DynamicCache(config=model.config)
    if "encoder_hidden_states" in inputs or getattr(model.config, "is_encoder_decoder", False):
        other = transformers.DynamicCache(config=model.config)
        return transformers.EncoderDecoderCache(cache, other)
    return cache


def cache_tensors(kv: Any) -> dict[str, Tensor]:
    """Every tensor that a cache holds, by layer and name."""
    return {
        f"{index}.{name}": value
        for index, layer in enumerate(kv.layers)
        for name, value in vars(layer).items()
        if isinstance(value, Tensor)
    }
