"""Which code an fxfuse op gets on which target: a table of providers, asked in order.

In come a device type and the facts of a call; out comes a Choice that says who took it and why the
others did not. `register` hands the ops to Inductor; nothing happens at import.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

import fxfuse.ops
from fxfuse.lowering.launch import KINDS
from fxfuse.patterns.record import Record

# Inductor's TensorBox, or any tensor.
Box = Any
Lower = Callable[[str, tuple[Any, ...], Record], tuple[Box, Box]]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a provider decides by: the record, and what its tensors say beyond it.

    heads   of q, k, v; None where a stream is absent or its head count is symbolic
    batch   B, None where symbolic
    """

    record: Record
    heads: tuple[int | None, ...]
    batch: int | None = None


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to lower the ops; `declines` gives the reason not to, or None."""

    name: str
    devices: frozenset[str] | None
    declines: Callable[[Facts], str | None]
    lower: Lower


@dataclasses.dataclass(frozen=True)
class Choice:
    """The provider of one call, and (provider, reason) for each that was asked before it."""

    provider: str
    declined: tuple[tuple[str, str], ...]


PROVIDERS: list[Provider] = []


def provider(
    name: str, devices: tuple[str, ...] | None, declines: Callable[[Facts], str | None]
) -> Callable[[Lower], Lower]:
    """Enter a lowering into the table; devices None is every device."""

    def enter(lower: Lower) -> Lower:
        PROVIDERS.append(Provider(name, frozenset(devices) if devices else None, declines, lower))
        return lower

    return enter


def _no_triton_kernel(facts: Facts) -> str | None:
    record = facts.record
    q, k, v = record.q, record.k, record.v
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if any(s is not None and s.dtype not in KERNEL_DTYPES for s in (q, k, v)):
        return f"the kernel writes {', '.join(KERNEL_DTYPES)} only"
    norms = [s.norm for s in (q, k, v) if s is not None and s.norm is not None]
    if any(n.kind not in KERNEL_NORMS for n in norms):
        return f"the kernel knows the norm kinds {', '.join(KERNEL_NORMS)} only"
    if q.rotation is not None and q.rotation.by_head:
        return "each head turns by tables of its own"
    if any(s is not None and len(s.passes) > 2 for s in (q, k)):
        return "the kernel passes at most two runs of channels through"
    if v is not None and (v.norm or v.rotation or v.has_scale or v.scale != 1.0):
        return "the kernel only copies v"
    expected = (True, k is not None, v is not None)
    if any(n is None for n, there in zip(facts.heads, expected, strict=True) if there):
        return "a head count is symbolic"
    if k is not None and v is not None and facts.heads[1] != facts.heads[2]:
        return "k and v differ in heads"
    if facts.batch is not None and facts.batch >= 2**16:
        return "a grid has at most 65535 batch rows"
    return None


KERNEL_DTYPES = ("float32", "float16", "bfloat16")
KERNEL_NORMS = tuple(KINDS)


@provider("triton", ("cuda",), _no_triton_kernel)
def _triton(name: str, args: tuple[Any, ...], record: Record) -> tuple[Box, Box]:
    from fxfuse.lowering import fused

    return fused.lower(name, args, record)


@provider("loops", None, lambda facts: None)
def _loops(name: str, args: tuple[Any, ...], record: Record) -> tuple[Box, Box]:
    from fxfuse.lowering import loops

    return loops.lower(name, args, record)


def choose(device_type: str, facts: Facts) -> Choice:
    """The provider that takes a call on a device type ("cuda" is ROCm too)."""
    declined: list[tuple[str, str]] = []
    for candidate in PROVIDERS:
        if candidate.devices is not None and device_type not in candidate.devices:
            reason: str | None = f"not for {device_type}"
        else:
            reason = candidate.declines(facts)
        if reason is None:
            return Choice(candidate.name, tuple(declined))
        declined.append((candidate.name, reason))
    raise LookupError(f"fxfuse: no provider takes a call on {device_type}: {declined}")


def facts_of(record: Record, q: Box, k: Box | None, v: Box | None) -> Facts:
    """Facts from tensors or boxes of [B, T, heads, D]."""

    def number(size: Any) -> int | None:
        return int(size) if isinstance(size, int) or getattr(size, "is_Integer", False) else None

    shapes = [None if x is None else _shape(x) for x in (q, k, v)]
    heads = tuple(None if shape is None else number(shape[2]) for shape in shapes)
    return Facts(record, heads, number(_shape(q)[0]))


def _shape(x: Box) -> Any:
    return x.shape if isinstance(x, torch.Tensor) else x.get_size()


# What each lowered call got, newest last; the report takes them from here.
chosen: list[Choice] = []


def _lower(name: str, *args: Any) -> tuple[Box, Box]:
    record = fxfuse.ops.read_record(args[-1])
    v = args[2] if name == "norm_rope_store_" else None
    choice = choose(args[0].get_device().type, facts_of(record, args[0], args[1], v))
    chosen.append(choice)
    taker = next(p for p in PROVIDERS if p.name == choice.provider)
    return taker.lower(name, args, record)


@functools.cache
def register() -> None:
    """Hand the ops to Inductor; call before compile_fx. Once a process is enough."""
    from fxfuse.lowering import inductor, norm_launch

    for name in ("norm_rope", "norm_rope_store_"):
        op = getattr(torch.ops.fxfuse, name).default
        inductor.register_op(op, functools.partial(_lower, name))
    inductor.register_op(torch.ops.fxfuse.add_rms_norm.default, norm_launch.lower)
