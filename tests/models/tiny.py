"""A family's tiny model, its inputs and caches, and the relative error between two runs.

In: a Family. Out: a real transformers model with weights that let errors show.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fxfuse.tiny import inputs
from tests.models.families import FAMILIES, SMALL, Family

BATCH, PROMPT, SLOTS = inputs.BATCH, inputs.PROMPT, 32
# What an untouched slot of a cache holds: a store into the wrong slot shows.
CANARY = 3.0


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that let errors show, in place.

    Linear layers get outputs of unit variance and norm weights are scattered around their own
    centre (1, or 0 where the model adds 1). The default initialisation (standard deviation 0.02)
    makes attention nearly uniform, and a wrong rotation invisible.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or not weight.numel():
            continue
        noise = torch.randn(weight.shape, generator=generator)
        weight.nan_to_num_(0.0, 0.0, 0.0)  # a parameter may be memory that nobody wrote
        if "norm" in name:
            weight.copy_(weight.mean().round().clamp(-1, 1) + 0.2 * noise)
        elif _is_embedding(name, weight):
            weight.copy_(0.5 * noise)
        elif weight.dim() > 1:
            weight.copy_(noise / math.sqrt(_fan_in(weight)))
        else:
            weight.add_(0.05 * noise)
    return model


def _is_embedding(name: str, weight: Tensor) -> bool:
    is_table = weight.dim() == 2 and weight.shape[0] > weight.shape[1]
    return is_table and ("embed" in name or "wte" in name)


def _fan_in(weight: Tensor) -> int:
    """Inputs of one output: of a linear layer, of stacked experts, of a convolution."""
    if weight.dim() > 3:
        return weight[0].numel()
    return max(weight.shape[-2:]) if weight.dim() == 3 else weight.shape[-1]


def config_of(family: Family, **changes: Any) -> Any:
    sizes = {**SMALL, **family.sizes, **changes}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    return getattr(transformers, family.config)(**sizes)


def build(family: Family, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model of this family; rotary frequencies stay float32, as `from_pretrained` leaves them."""
    torch.manual_seed(0)
    model = randomise(getattr(transformers, family.model)(config_of(family, **changes)).eval())
    frequencies = {n: b.clone() for n, b in model.named_buffers() if "inv_freq" in n}
    model.to(dtype)
    for name, kept in frequencies.items():
        module, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(module), leaf, kept)
    return model


@cache
def model_of(name: str) -> nn.Module:
    """The float32 model of a family; built once in a process."""
    return build(FAMILIES[name])


def token_ids(tokens: int, seed: int = 1, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SMALL["vocab_size"], (batch, tokens), generator=generator)


def static_cache(model: Any, slots: int = SLOTS, batch: int = BATCH) -> Any:
    """A StaticCache with its memory allocated, every slot a canary."""
    kv = transformers.StaticCache(config=model.config, max_cache_len=slots)
    with torch.no_grad():
        model(token_ids(1, batch=batch).to(model.device), past_key_values=kv, use_cache=True)
    kv.reset()
    for tensor in cache_tensors(kv).values():
        if tensor.is_floating_point():
            tensor.fill_(CANARY)
    return kv


def cache_tensors(kv: Any) -> dict[str, Tensor]:
    """Every tensor that a cache holds, by layer and name."""
    return {
        f"{index}.{name}": value
        for index, layer in enumerate(kv.layers)
        for name, value in vars(layer).items()
        if isinstance(value, Tensor)
    }


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| as vectors, in float64."""
    assert got.shape == want.shape and got.dtype == want.dtype
    difference = torch.linalg.vector_norm(got.double() - want.double())
    return float(difference / torch.linalg.vector_norm(want.double()).clamp_min(1e-30))


def assert_close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """float32 runs of one model differ by rounding, near 1e-6; a dropped sign gives 5e-2."""
    error = relative_error(got, want)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def assert_same_cache(got: Any, want: Any, what: str) -> None:
    """Equal lengths; keys and values equal up to rounding, canaries included."""
    got_tensors, want_tensors = cache_tensors(got), cache_tensors(want)
    assert got_tensors.keys() == want_tensors.keys()
    for name, tensor in want_tensors.items():
        if tensor.is_floating_point():
            assert_close(got_tensors[name], tensor, f"{what}, cache {name}")
        else:
            assert torch.equal(got_tensors[name], tensor), f"{what}, cache {name}"
