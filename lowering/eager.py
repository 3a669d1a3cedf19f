"""Ops called in eager code on a GPU: Triton's kernels, launched on the tensors as they are.

In come an op's name, arguments and record; out come its results, or None where Triton's provider
does not take the call, and the caller runs the reference.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fxfuse.add_norm
import fxfuse.ops
from fxfuse.lowering import launch, providers
from fxfuse.lowering.arch import arch_of
from fxfuse.patterns.record import AddNorm, DecodeAttention, Record

# The kernels load these by their channel alone.
CONTIGUOUS = ("weight", "q_weight", "k_weight", "q_bias", "k_bias")


def launched(name: str, args: tuple[Any, ...], record: Record | AddNorm | DecodeAttention) -> Any:
    """The op's results by one launch; a kernel that raises is asked no more, with one warning.

    Mutates: caches, as the op does.
    """
    tensors = dict(zip(providers.arguments(name), args, strict=True))
    facts = providers.facts_of(record, tensors)
    provider = providers.named("triton", facts)
    if provider is None:
        return None
    tensors |= {n: tensors[n].contiguous() for n in CONTIGUOUS if tensors.get(n) is not None}
    try:
        launch_on: Callable[..., Any] = LAUNCHED.get(type(record), _norm_rope)
        with _on(facts.device):
            return launch_on(record, tensors)
    except Exception as error:
        providers.drop(provider, "running", error)
        return None


def _add_norm(record: AddNorm, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    from fxfuse.lowering import norm_launch

    given = {n: x for n, x in tensors.items() if isinstance(x, Tensor)}
    return norm_launch.launch_on(record, given, tensors["eps"])


def _decode_attention(record: DecodeAttention, tensors: dict[str, Any]) -> Tensor:
    from fxfuse.lowering import attention_launch, direct

    given = {n: x for n, x in tensors.items() if isinstance(x, Tensor)}
    plan, out, _ = attention_launch.on_tensors(given, tensors["scale"])
    if out.numel():
        direct.prepared(plan)()
    return out


def _norm_rope(record: Record, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    from fxfuse.lowering import direct

    q, eps = tensors["q"], (tensors["q_eps"], tensors["k_eps"])
    results = fxfuse.ops.empty_results(q, tensors["k"], record)
    if 0 in q.shape[:2]:
        return results
    given = {n: x for n, x in tensors.items() if isinstance(x, Tensor)} | {"q_out": results[0]}
    if results[1].dim() == 4:
        given["k_out"] = results[1]
    plan = direct.planned(record, given, eps, arch_of(q.device))
    direct.prepared(with_stride_arguments(plan))()
    return results


LAUNCHED: dict[type, Callable[..., Any]] = {
    AddNorm: _add_norm,
    DecodeAttention: _decode_attention,
}


def with_stride_arguments(plan: launch.Launch) -> launch.Launch:
    """The launch with strides as arguments, so that other strides, as other numbers of tokens
    have, compile nothing anew.
    """
    constants = dict(plan.constants)
    strides = launch.stride_arguments(constants.pop("STRIDES"))
    return dataclasses.replace(
        plan, kernel="norm_rope_store", arguments=plan.arguments | strides, constants=constants
    )


def _on(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; its interpreter runs on the CPU."""
    if device is None or device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(device)
