"""Casts: what a graph does to rows between their rounding and a cache of another format.

    rows = (k / k_scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)

In comes a cache write, out comes the same write with the calls of such a chain in its `Cast`, read
backwards from the cache; or the write as it came, where its rows are of no 8-bit format. Rows that
were joined as bytes are written by two.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.parted import parted
from fxfuse.patterns.read import Reading
from fxfuse.patterns.record import Cast
from fxfuse.patterns.site import StoreWrite
from fxfuse.patterns.transfer import is_exact_cast
from fxfuse.slots import Call, Slot

aten = torch.ops.aten

FORMATS = {
    getattr(torch, name): name
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    if hasattr(torch, name)
}
EIGHT_BITS = (*FORMATS, torch.uint8)
ROUNDED = (torch.float32, torch.float16, torch.bfloat16)


def casts_of(reading: Reading, store: StoreWrite) -> Sequence[StoreWrite]:
    """The write with what its rows went through since they were rounded last; or two, of rows that
    were joined after that. Raises Refused where that is no `Cast`.
    """
    if store.axes:
        return [store]
    slot = store.value
    if slot.dtype not in EIGHT_BITS:
        if slot.dtype != store.cache.dtype:
            raise Refused(f"a cache of {store.cache.dtype} for rows of {slot.dtype}")
        return [store]
    chain = _Chain(reading)
    while slot.call is not None:
        before = chain.step(slot.call)
        if before is None:
            break
        slot = before
    cast = dataclasses.replace(store, cast=chain.cast, through=chain.through, scale=chain.scale)
    if any(reading.is_written(call.outs[0], store.call) for call in chain.through):
        raise Refused("rows that are written between their cast and their store")
    if not chain.cast.dtype:
        parts = parted(reading, cast)
        if len(parts) == 1:
            raise Refused(f"rows of {store.value.dtype} that are no cast of rows")
        return [cast for part in parts for cast in casts_of(reading, part)]
    if store.cache.dtype not in (getattr(torch, chain.cast.dtype), torch.uint8):
        raise Refused(f"a cache of {store.cache.dtype} for rows of {chain.cast.dtype}")
    return [cast]


class _Chain:
    """The calls of a cast, last to first."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.cast = Cast()
        self.through: dict[Call, Slot] = {}
        self.scale: tuple[Slot, Call] | None = None
        self.seen: set[str] = set()

    def step(self, call: Call) -> Slot | None:
        """The tensor that a call of the chain was done to; None at the chain's beginning."""
        reader = STEPS.get(call.op)
        if reader is None:
            is_view = self.reading.relations.get(call) == "view"
            return call.inputs()[0] if is_view else None
        before: Slot | None = reader(self, call)
        if before is None or before.shape != call.outs[0].shape:
            return None
        self.through[call] = before
        return before

    def set(self, part: str, **fields: Any) -> None:
        """One part of the cast, each once: a clamp stands behind what multiplies."""
        if part in self.seen or (part == "limit" and self.seen & {"scale", "factor"}):
            raise Refused(f"rows that are cast with another {part} before")
        self.seen.add(part)
        self.cast = dataclasses.replace(self.cast, **fields)


def _bits(chain: _Chain, call: Call) -> Slot | None:
    """x.view(torch.uint8)"""
    x: Slot = call.args[0]
    return x if x.dtype in FORMATS else None


def _to(chain: _Chain, call: Call) -> Slot | None:
    x, new = call.args[0], call.outs[0].dtype
    if new in FORMATS:
        chain.set("format", dtype=FORMATS[new])
    elif new not in ROUNDED:
        return None
    elif not isinstance(x, Slot) or not is_exact_cast(x.dtype, new):
        return None  # the rounding of the rows themselves
    return x if isinstance(x, Slot) and x.dtype in ROUNDED else None


def _clamp(chain: _Chain, call: Call) -> Slot | None:
    x, low, high = (*call.args, None, None)[:3]
    low, high = call.kwargs.get("min", low), call.kwargs.get("max", high)
    if not chain.cast.dtype or not isinstance(high, (int, float)) or low != -high or high <= 0:
        raise Refused(f"rows that are clamped to {low}, {high} before they are stored")
    chain.set("limit", limit=float(high))
    slot: Slot = x
    return slot


def _scale(chain: _Chain, call: Call) -> Slot | None:
    """x / scale or x * scale, by a tensor or a number."""
    x, by = call.args[:2]
    divides = call.op in (aten.div.Tensor, aten.div.Scalar)
    if not chain.cast.dtype or call.kwargs or chain.scale is not None:
        return None
    if isinstance(by, (int, float)) and not isinstance(by, bool) and by > 0:
        chain.set("factor", factor=1 / by if divides else float(by))
        return x if isinstance(x, Slot) else None
    if not isinstance(x, Slot) or not isinstance(by, Slot):
        return None
    if not divides and _is_scale(x, by):
        x, by = by, x
    if not _is_scale(by, x) or by.dtype not in ROUNDED:
        return None
    chain.set("scale", scale="divide" if divides else "multiply")
    chain.scale = (by, call)
    return x


def _is_scale(by: Slot, x: Slot) -> bool:
    """Whether a factor is the same for all channels of a row."""
    return len(by.shape) <= len(x.shape) and (not by.shape or by.shape[-1] == 1)


def _copy(chain: _Chain, call: Call) -> Slot | None:
    """A copy of what is cast; one in front of the cast is the rows themselves."""
    x: Slot = call.args[0]
    return x if x.dtype in EIGHT_BITS else None


STEPS: dict[Any, Any] = {
    aten.view.dtype: _bits,
    aten._to_copy.default: _to,
    aten.clone.default: _copy,
    aten.contiguous.default: _copy,
    aten.clamp.default: _clamp,
    aten.div.Tensor: _scale,
    aten.div.Scalar: _scale,
    aten.mul.Tensor: _scale,
    aten.mul.Scalar: _scale,
}
