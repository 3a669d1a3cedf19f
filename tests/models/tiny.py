"""A family's tiny model, its inputs and caches, and whether two runs are the same.

In: a Family. Out: a real transformers model with weights that let errors show.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fxfuse.sweep.scenarios import CANARY, SLOTS, relative_error
from fxfuse.tiny import inputs
from fxfuse.tiny.model import cache_tensors
from fxfuse.tiny.weights import randomise
from tests.models.families import FAMILIES, SMALL, Family

BATCH, PROMPT = inputs.BATCH, inputs.PROMPT


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
