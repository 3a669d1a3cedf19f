"""A unit's tiny model and its inputs, on a device and in a dtype.

In: a Unit. Out: an `Example`: the model in eval mode with weights that let errors show
(tests/models/tiny.py), its inputs for a number of tokens, and whether it takes a KV cache.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.models.tiny import randomise
from tests.sweep.inputs import inputs_of
from tests.sweep.overrides import OVERRIDES
from tests.sweep.sizes import tiny_config
from tests.sweep.units import Unit

# Buffers that `from_pretrained` leaves in float32 in a model of any dtype.
FREQUENCIES = re.compile(r"inv_freq|freqs")
# Models with a cache class of their own, which refuse the library's.
OWN_CACHE = {"minimax": "MiniMaxCache"}


@dataclass(frozen=True)
class Example:
    """A model and `inputs(tokens)`, a fresh copy of its inputs at each call."""

    unit: Unit
    model: nn.Module
    inputs: Callable[[int], dict[str, Any]]

    @property
    def parameters(self) -> Any:
        return inspect.signature(self.model.forward).parameters

    @property
    def takes_cache(self) -> bool:
        names = self.parameters.keys()
        fed = names & {"input_ids", "inputs_embeds"}
        return bool(self.unit.library == "transformers" and "past_key_values" in names and fed)

    @property
    def own_cache(self) -> Any:
        """The cache class of a model that takes no other, None elsewhere."""
        name = OWN_CACHE.get(self.unit.name)
        return getattr(sys.modules[self.unit.module], name) if name else None


def example_of(unit: Unit, dtype: torch.dtype, device: str) -> Example:
    if unit.library == "diffusers":
        from tests.sweep.diffusion import diffusers_inputs, diffusers_model

        built, make_inputs = diffusers_model(unit), diffusers_inputs
    else:
        built, make_inputs = _transformers_model(unit), inputs_of
    model = _cast(randomise(built.float()).eval(), dtype).to(device)

    def inputs(tokens: int) -> dict[str, Any]:
        made = make_inputs(unit.name, model, tokens)
        return {name: _moved(value, dtype, device) for name, value in made.items()}

    return Example(unit, model, inputs)


def _transformers_model(unit: Unit) -> nn.Module:
    """The model with scaled_dot_product_attention, or with the eager form where it has no other."""
    model = unit.model_class()
    for attention in ("sdpa", "eager"):
        config = tiny_config(model.config_class, OVERRIDES.get(unit.name))
        config._attn_implementation = attention
        torch.manual_seed(0)
        try:
            return model(config)
        except ValueError as error:
            if attention == "eager" or not re.search(r"sdpa|attention|scaled_dot", str(error)):
                raise
    raise AssertionError("unreachable")


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in a dtype; what `from_pretrained` would leave in float32 stays so."""
    if dtype == torch.float32:
        return model
    kept = {n: b.clone() for n, b in model.named_buffers() if FREQUENCIES.search(n)}
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    names = re.compile("|".join(rf"(^|\.){re.escape(n)}(\.|$)" for n in strict) or "(?!)")
    exact = {n: p.detach().clone() for n, p in model.named_parameters() if names.search(n)}
    model.to(dtype)
    for name, buffer in kept.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, buffer)
    for name, value in exact.items():
        model.get_parameter(name).data = value
    return model


def _moved(value: Any, dtype: torch.dtype, device: str) -> Any:
    """A copy on the device, floating tensors in the dtype; containers are walked."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else None, copy=True)

    return pytree.tree_map(moved, value)
