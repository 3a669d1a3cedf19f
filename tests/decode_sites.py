"""Attention with one query row as operands: what its kernel is tested with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fxfuse.patterns.record import DecodeAttention

INF = float("inf")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes, and what the mask is: none, or "filled" (the first slots), "window" (some in the
    middle), "holes", "padded" (another window for each batch row), "heads" (another for each head),
    "nothing"; boolean, or added to the scores; slots first, or heads first.
    """

    heads: int
    kv_heads: int
    channels: int
    slots: int
    mask: str = "filled"
    is_boolean: bool = True
    batch: int = 1
    v_channels: int | None = None
    slots_first: bool = False


SHAPES = {
    "qwen3": Shape(4, 2, 16, 40),
    "one group": Shape(8, 1, 32, 50, "padded", batch=3),
    "as many heads": Shape(3, 3, 16, 33, "holes"),
    "no mask": Shape(4, 2, 16, 45, ""),
    "added": Shape(6, 2, 20, 70, "window", is_boolean=False, batch=2),
    "by head": Shape(6, 2, 16, 64, "heads", batch=2),
    "by head, added": Shape(6, 2, 16, 61, "heads", is_boolean=False, batch=2),
    "nothing": Shape(4, 2, 16, 40, "nothing"),
    "nothing, added": Shape(4, 2, 16, 40, "nothing", is_boolean=False),
    "v is narrower": Shape(4, 2, 48, 40, "window", v_channels=20, slots_first=True),
    "one slot": Shape(4, 2, 16, 1),
}


def tensors(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """The op's tensors by its names."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    b, h, g, s, d = shape.batch, shape.heads, shape.kv_heads, shape.slots, shape.channels
    found = {"q": draw(b, h, 1, d)}
    for name, width in (("k", d), ("v", shape.v_channels or d)):
        if shape.slots_first:
            found[name] = draw(b, s, g, width).transpose(1, 2)
        else:
            found[name] = draw(b, g, s, width)
    if shape.mask:
        attended = attended_slots(shape, device)
        if shape.is_boolean:
            found["mask"] = attended
        else:
            added = draw(*attended.shape)
            found["mask"] = added.masked_fill(~attended, -INF)
    return found


def attended_slots(shape: Shape, device: str = "cpu") -> Tensor:
    """[1 or B, 1 or H, 1, S], booleans."""
    s = shape.slots
    at = torch.arange(s, device=device)
    if shape.mask == "nothing":
        return torch.zeros(1, 1, 1, s, dtype=torch.bool, device=device)
    if shape.mask == "filled":
        return (at <= s // 3)[None, None, None]
    if shape.mask == "window":
        return ((at >= s // 3) & (at <= s // 2))[None, None, None]
    if shape.mask == "holes":
        return (at % 3 == 1)[None, None, None]
    rows = torch.arange(shape.batch, device=device)[:, None]
    if shape.mask == "padded":
        return ((at >= 2 * rows) & (at <= s - 5 * rows - 1))[:, None, None]
    # Other slots for each head, and none for the last one.
    heads = torch.arange(shape.heads, device=device)[None, :, None]
    found = ((at >= heads) & (at < s // 2 + 3 * heads + rows[:, None])) & (at % 4 > 0)
    return (found & (heads < shape.heads - 1))[:, :, None]


def truth(given: dict[str, Tensor], scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale + mask) v in float64, by head; 0 where nothing is attended."""
    q, k, v = (given[name].double() for name in "qkv")
    times = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = given.get("mask")
    if mask is not None:
        added = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        scores = scores + (added.masked_fill(~mask, -INF) if mask.dtype == torch.bool else mask)
    most = scores.amax(-1, keepdim=True).clamp(min=-1e300)
    p = (scores - most).exp()
    return p @ v / p.sum(-1, keepdim=True).clamp(min=1e-300)


def record_of(given: dict[str, Tensor]) -> DecodeAttention:
    q, k, v, mask = (given.get(name) for name in ("q", "k", "v", "mask"))
    kind = "" if mask is None else "bool" if mask.dtype == torch.bool else _name(mask)
    return DecodeAttention(
        q.shape[1], k.shape[1], q.shape[3], v.shape[3], k.shape[2], kind, _name(q)
    )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def arguments(given: dict[str, Tensor], scale: float | None = None) -> tuple[Any, ...]:
    """The op's arguments, in order."""
    operands = [given.get(name) for name in ("q", "k", "v", "mask")]
    return (*operands, scale, record_of(given).to_text())
