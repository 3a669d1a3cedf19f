"""A unit's tiny model and its inputs, on a device and in a dtype.

In: a Unit. Out: an `Example`: the model in eval mode with weights that let errors show
(fxfuse/tiny/weights.py), its inputs for a number of tokens, and whether it takes a KV cache.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.tiny.inputs import inputs_of
from fxfuse.tiny.model import new_cache, takes_cache, tiny_model
from fxfuse.tiny.units import Unit, units_of
from fxfuse.tiny.weights import randomise

# Buffers that `from_pretrained` leaves in float32 in a model of any dtype.
FREQUENCIES = re.compile(r"inv_freq|freqs")


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
        return self.unit.library == "transformers" and takes_cache(self.model)

    def new_cache(self, kind: str, slots: int) -> Any:
        """An empty cache, "static" or "dynamic"."""
        return new_cache(self.model, kind, slots, self.inputs(1))


def example_of(unit: Unit, dtype: torch.dtype, device: str) -> Example:
    if unit.library == "diffusers":
        from fxfuse.tiny.diffusion import diffusers_inputs, diffusers_model

        built, make_inputs = diffusers_model(unit), diffusers_inputs
    else:
        built, make_inputs = tiny_model(unit), inputs_of
    model = _cast(randomise(built.float()).eval(), dtype).to(device)

    def inputs(tokens: int) -> dict[str, Any]:
        made = make_inputs(unit.name, model, tokens)
        return {name: _moved(value, dtype, device) for name, value in made.items()}

    return Example(unit, model, inputs)


def unit_named(name: str) -> Unit:
    """One unit by its full name; a name that starts with `diffusers/` is one of that library."""
    if name.startswith("diffusers/"):
        from fxfuse.tiny.diffusion import diffusers_units

        return diffusers_units()[name]
    return units_of(name.partition(".")[0])[name]


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
