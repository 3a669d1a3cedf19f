"""The four ways a model is called: without a cache, and with one that is static or grows.

In: an Example. Out: `Scenario`s: how to prepare a state, how to call a model with it, and every
tensor that must then be as eager leaves it. Slots of a static cache that no call writes hold a
canary, so a row written to the wrong place shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxfuse.sweep.build import Example
from fxfuse.tiny.inputs import PROMPT
from fxfuse.tiny.model import cache_tensors, why_no_static_cache

NAMES = ("no_cache", "static_prefill", "static_decode", "dynamic_decode")
USUAL = ("static_prefill", "static_decode")
SLOTS = 32
# What an untouched slot of a cache holds: a store into the wrong slot shows.
CANARY = 3.0
# Relative vector norms. float32 runs of one model differ by rounding, near 1e-6, and a dropped sign
# gives 5e-2; in bfloat16 every rounding that a compiler leaves out shows, up to 1e-2.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# Outputs that are compared as caches, or not at all.
CACHES = ("past_key_values", "encoder_past_key_values", "cache_params", "padding_cache")


@dataclass(frozen=True)
class Scenario:
    """`call(model, prepare())` is one run."""

    name: str
    prepare: Callable[[], Any]
    call: Callable[[Any, Any], Any]

    def tensors(self, output: Any, cache: Any) -> dict[str, Tensor]:
        """What the run left: the floating outputs, and the cache."""
        found = dict(_floating(output, "output"))
        return {**found, **_cache_contents(cache)}


def scenarios_for(example: Example, wanted: tuple[str, ...]) -> tuple[list[str], str]:
    """Names of the scenarios that a model can run, and why some became others.

    A model without a cache has one; one that no static cache serves decodes with a growing one.
    """
    if not example.takes_cache:
        return ["no_cache"], ""
    reason = _no_static_cache(example)
    if not reason:
        return list(wanted), ""
    kept = [n for n in wanted if not n.startswith("static")]
    if "static_decode" in wanted and "dynamic_decode" not in kept:
        kept.append("dynamic_decode")
    return kept or ["dynamic_decode"], f"no static cache: {reason}"


def scenario_of(example: Example, name: str) -> Scenario:
    if name == "no_cache":
        return _without_cache(example)
    kind, _, phase = name.partition("_")

    def prepare() -> Any:
        cache = _static_cache(example) if kind == "static" else example.new_cache("dynamic", SLOTS)
        if phase == "decode":
            _run(example.model, example.inputs(PROMPT), cache)
        return cache

    tokens = PROMPT if phase == "prefill" else 1
    return Scenario(name, prepare, lambda model, cache: _run(model, example.inputs(tokens), cache))


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| as vectors, in float64."""
    assert got.shape == want.shape and got.dtype == want.dtype
    difference = torch.linalg.vector_norm(got.double() - want.double())
    return float(difference / torch.linalg.vector_norm(want.double()).clamp_min(1e-30))


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error and the tensor that has it; infinite where no comparison holds."""
    if got.keys() != want.keys():
        return float("inf"), f"other tensors: {', '.join(sorted(got.keys() ^ want.keys()))}"
    worst = (0.0, "")
    for name, tensor in want.items():
        other = got[name]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            return float("inf"), f"{name}: {other.shape} {other.dtype}"
        # What eager leaves infinite or undefined (masked rows, mostly) must be so here too.
        finite = torch.isfinite(tensor)
        if not torch.equal(torch.isfinite(other), finite):
            return float("inf"), f"{name}: finite elsewhere"
        worst = max(worst, (relative_error(other[finite], tensor[finite]), name))
    return worst


def _without_cache(example: Example) -> Scenario:
    names = example.parameters.keys()
    off = {"use_cache": False} if "use_cache" in names or "past_key_values" in names else {}

    def call(model: Any, _: None) -> Any:
        return model(**{**example.inputs(PROMPT), **off})

    return Scenario("no_cache", lambda: None, call)


def _run(model: Any, inputs: dict[str, Any], cache: Any) -> Any:
    return model(**inputs, past_key_values=cache, use_cache=True)


def _no_static_cache(example: Example) -> str:
    if reason := why_no_static_cache(example.model):
        return reason
    try:
        example.new_cache("static", SLOTS)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def _static_cache(example: Example) -> Any:
    """A StaticCache with its memory allocated and a canary in every slot."""
    cache = example.new_cache("static", SLOTS)
    _run(example.model, example.inputs(PROMPT), cache)
    cache.reset()
    for layer in _own(cache).layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.fill_(CANARY)
    return cache


def _own(cache: Any) -> Any:
    """The part of a cache that the model's own tokens go into."""
    return getattr(cache, "self_attention_cache", cache)


def _cache_contents(cache: Any) -> dict[str, Tensor]:
    layers = _own(cache)
    if not hasattr(layers, "layers"):
        return {}
    held = {f"cache {n}": t for n, t in cache_tensors(layers).items()}
    for index, layer in enumerate(layers.layers):
        nested = {n: v for n, v in vars(layer).items() if isinstance(v, dict)}
        for name, tensors in nested.items():
            held |= {f"cache {index}.{name}.{k}": t for k, t in tensors.items()}
    floating = {n: t for n, t in held.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return {n: t.detach().clone() for n, t in floating.items()}


def _floating(value: Any, path: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        is_number = value.is_floating_point() or value.is_complex()
        return [(path, value.detach().clone())] if is_number and value.numel() else []
    if isinstance(value, dict):
        items = [(f"{path}.{k}", v) for k, v in value.items() if k not in CACHES]
    elif isinstance(value, (list, tuple)):
        items = [(f"{path}.{i}", v) for i, v in enumerate(value)]
    else:
        return []
    return [pair for name, part in items for pair in _floating(part, name)]
