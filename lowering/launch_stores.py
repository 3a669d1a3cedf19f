"""What a launch says of the caches: constants, strides and sizes by the layouts of the record."""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from fxfuse.lowering.operand import Operand, Size
from fxfuse.patterns.record import Layout, Record, Store

# The formats that the kernel casts to, by its numbers.
FORMATS = {"": 0, "float8_e4m3fn": 1, "float8_e5m2": 2, "float8_e4m3fnuz": 3, "float8_e5m2fnuz": 4}
NEGATIVE = {"invalid": 0, "wrap": 1, "skip": 2}
SCALES = {"": 0, "divide": 1, "multiply": 2}
MAX_INDICES = 3
# The first float32 that is rounded past the largest number, halfway to the one that is missing.
PAST = {
    "float8_e4m3fn": 464.0 + 2.0**-15,
    "float8_e5m2": 61440.0,
    "float8_e4m3fnuz": 248.0,
    "float8_e5m2fnuz": 61440.0,
}


def caches(
    record: Record, operands: Mapping[str, Operand | None]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The kernel's CACHE tuples of k and v."""
    store = record.store
    if store is None or operands.get("k_cache") is None:
        return _NONE, _NONE
    found = []
    for name, layout in (("k", store.k), ("v", store.v)):
        cache = operands.get(f"{name}_cache")
        found.append(_cache(layout, store, cache, operands) if cache else _NONE)
    return found[0], found[1]


_NONE = (0,) * 14 + (1, 0, 0, 1.0, 0.0, 0.0, 0, False, False, False, 0)


def _cache(
    layout: Layout, store: Store, cache: Operand, operands: Mapping[str, Operand | None]
) -> tuple[Any, ...]:
    indices: list[Any] = []
    for i, (operand, divisor, modulus) in enumerate(layout.index):
        size = cache.shape[layout.axes.index(str(i))]
        within = isinstance(size, int) and 0 < modulus <= size
        indices += [operand, divisor, modulus, not within]
    indices += [0] * (4 * MAX_INDICES - len(indices))
    inner = int(cache.shape[layout.axes.index("e")]) if "e" in layout.axes else 1
    cast = layout.cast
    past, bits, signed = beyond(cast.dtype)
    if 0.0 < cast.limit < past:
        past = 0.0
    return (
        len(layout.index),
        NEGATIVE[store.negative],
        *indices,
        inner,
        FORMATS[cast.dtype],
        SCALES[cast.scale],
        float(cast.factor),
        float(cast.limit),
        past,
        bits,
        signed,
        operands.get("offsets") is not None,
        store.skipped is not None,
        store.skipped or 0,
    )


@functools.cache
def beyond(dtype: str) -> tuple[float, int, bool]:
    """What torch rounds to no finite number: from where on, to which bits, and whether these have
    the number's sign. (0.0, ..) where it stops at the largest number, as Triton's casts do.
    """
    if not dtype:
        return 0.0, 0, False
    far = torch.tensor([1e30, -1e30]).to(getattr(torch, dtype))
    if bool(far.float().isfinite().all()):
        return 0.0, 0, False
    above, below = far.view(torch.uint8).tolist()
    return PAST[dtype], above & 0x7F if above != below else above, above != below


def strides(
    record: Record, operands: Mapping[str, Operand | None], name: str
) -> tuple[Size, ...] | None:
    """A cache's strides for b, h, its three indices, d and e; 0 for what it lacks."""
    cache, store = operands.get(f"{name}_cache"), record.store
    if cache is None or store is None:
        return None
    axes = (store.k if name == "k" else store.v).axes

    def stride(letter: str) -> Size:
        if letter not in axes or (letter == "b" and cache.shape[axes.index(letter)] == 1):
            return 0
        return cache.strides[axes.index(letter)]

    return tuple(stride(letter) for letter in "bh012de")


def sizes(record: Record, operands: Mapping[str, Operand | None]) -> dict[str, Size]:
    """The sizes of the indexed axes of both caches, as the kernel's arguments."""
    found = {f"{name}_size_{i}": 0 for name in "kv" for i in range(MAX_INDICES)}
    for name in "kv":
        cache, store = operands.get(f"{name}_cache"), record.store
        if cache is not None and store is not None:
            axes = (store.k if name == "k" else store.v).axes
            for i in range(MAX_INDICES):
                if str(i) in axes:
                    found[f"{name}_size_{i}"] = cache.shape[axes.index(str(i))]
    return found
