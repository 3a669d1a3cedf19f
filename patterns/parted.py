"""Parted: one write of rows that were joined, as a write of each into its part of the cache.

    kv[:, blocks, offsets] = torch.stack([k, v])
    kv[blocks, offsets] = torch.cat([k, v], -1)

In comes a cache write, out come two, or the one as it came.
"""

import dataclasses
from collections.abc import Sequence

import torch

from fxfuse.patterns.read import Reading
from fxfuse.patterns.site import StoreWrite
from fxfuse.slots import Call, Size, Slot

aten = torch.ops.aten

JOINTS = (aten.stack.default, aten.cat.default)


def parted(reading: Reading, store: StoreWrite) -> Sequence[StoreWrite]:
    """The writes of the two tensors that the written one is joined of along an axis of the cache,
    where they are as they were when they were joined.
    """
    joint = store.value.call
    if joint is None or joint.op not in JOINTS or store.axes or store.joint:
        return [store]
    parts, axis = _joined(joint, *joint.args, **joint.kwargs)
    places = [d for d, place in enumerate(store.places) if place == axis]
    along = [d for d in places if d not in store.indexed]
    if len(parts) != 2 or not along or not _is_as_it_was(reading, store, joint):
        return [store]
    if any(part.dtype != store.value.dtype for part in parts):
        return [store]
    if joint.op is aten.stack.default:
        return [_row(store, joint, part, axis, along[0], i) for i, part in enumerate(parts)]
    sizes = [part.shape[axis] if len(part.shape) == len(store.value.shape) else 0 for part in parts]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return [store]
    starts = (0, sizes[0])
    return [
        _range(store, joint, part, along[0], start, size)
        for part, start, size in zip(parts, starts, sizes, strict=True)
    ]


def _joined(joint: Call, parts: Sequence[Slot], dim: int = 0) -> tuple[Sequence[Slot], int]:
    """What was joined, and along which axis of the result."""
    return parts, dim % len(joint.outs[0].shape)


def _is_as_it_was(reading: Reading, store: StoreWrite, joint: Call) -> bool:
    """Whether nothing writes to what was joined, or to what it gave, before that is stored."""
    return all(
        reading.versions_at(joint, slot.storage) == reading.versions_at(store.call, slot.storage)
        for slot in (*joint.inputs(), *joint.outs)
    )


def _row(store: StoreWrite, joint: Call, value: Slot, axis: int, d: int, i: int) -> StoreWrite:
    """The write of what became place `i` of the value's axis, which is axis `d` of the cache."""
    cache = store.cache
    shape, stride = (
        tuple(x for j, x in enumerate(xs) if j != d) for xs in (cache.shape, cache.stride)
    )
    part = dataclasses.replace(
        cache, shape=shape, stride=stride, offset=cache.offset + i * cache.stride[d]
    )
    places = tuple(
        place - 1 if j not in store.indexed and place is not None and place > axis else place
        for j, place in enumerate(store.places)
        if j != d
    )
    return dataclasses.replace(
        store,
        cache=_taken(part, Call(aten.select.int, (cache, d, i), {}, store.call.node)),
        value=value,
        places=places,
        indexed=frozenset(j - (j > d) for j in store.indexed),
        tokens=tuple(j - (j > axis) for j in store.tokens),
        joint=joint,
    )


def _range(
    store: StoreWrite, joint: Call, value: Slot, d: int, start: int, size: int
) -> StoreWrite:
    """The write of what became `size` places from `start` on of axis `d` of the cache."""
    cache = store.cache
    shape: tuple[Size, ...] = (*cache.shape[:d], size, *cache.shape[d + 1 :])
    part = dataclasses.replace(cache, shape=shape, offset=cache.offset + start * cache.stride[d])
    taken = Call(aten.slice.Tensor, (cache, d, start, start + size), {}, store.call.node)
    return dataclasses.replace(store, cache=_taken(part, taken), value=value, joint=joint)


def _taken(part: Slot, call: Call) -> Slot:
    """A view that the graph does not take, as the result of a call."""
    part.call, call.outs = call, (part,)
    return part
