"""Parted: one write of rows that were joined, as a write of each into its part of the cache.

    kv[:, blocks, offsets] = torch.stack([k, v])
    kv[blocks, offsets] = torch.cat([k, v], -1).to(torch.float8_e4m3fn).view(-1, 2 * G, D)

Views and a cast of the joined rows are views and a cast of each. In comes a cache write, out come
two, or the one as it came.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from fxfuse.patterns.atoms import Atoms, walking
from fxfuse.patterns.cut import seen_from
from fxfuse.patterns.read import Reading
from fxfuse.patterns.site import StoreWrite
from fxfuse.patterns.value import Value, product
from fxfuse.slots import Call, Size, Slot

aten = torch.ops.aten

JOINTS = (aten.stack.default, aten.cat.default)

# What walks an axis of a cache, or the number of the index that does.
Axis: TypeAlias = Atoms | int


def parted(reading: Reading, store: StoreWrite) -> Sequence[StoreWrite]:
    """The writes of the two tensors that the written one is joined of, where they are as they were
    when they were joined, and each axis of the cache is one of theirs.
    """
    joint = _joint(reading, store)
    if joint is None or store.axes or store.joint or not _is_as_it_was(reading, store, joint):
        return [store]
    parts, axis = _joined(joint, *joint.args, **joint.kwargs)
    if len(parts) != 2 or any(part.dtype != joint.outs[0].dtype for part in parts):
        return [store]
    value = seen_from(reading, joint.outs[0], store.value, store.through)
    if value is None or len(value.terms) != 1 or _is_scaled_by_row(store):
        return [store]
    return _writes(store, joint, parts, axis, value) or [store]


def _joint(reading: Reading, store: StoreWrite) -> Call | None:
    """What joined the stored rows, seen through views and their cast."""
    slot = store.value
    while (call := slot.call) is not None and call.op not in JOINTS:
        if call not in store.through and reading.relations.get(call) != "view":
            return None
        slot = store.through.get(call, call.inputs()[0])
    return slot.call


def _joined(joint: Call, parts: Sequence[Slot], dim: int = 0) -> tuple[Sequence[Slot], int]:
    """What was joined, and along which axis of the result."""
    return parts, dim % len(joint.outs[0].shape)


def _is_as_it_was(reading: Reading, store: StoreWrite, joint: Call) -> bool:
    """Whether nothing writes to what was joined, or to what it gave, before that is stored."""
    return all(
        reading.versions_at(joint, slot.storage) == reading.versions_at(store.call, slot.storage)
        for slot in (*joint.inputs(), *joint.outs)
    )


def _is_scaled_by_row(store: StoreWrite) -> bool:
    return store.scale is not None and any(size != 1 for size in store.scale[0].shape)


def _writes(
    store: StoreWrite, joint: Call, parts: Sequence[Slot], axis: int, value: Value
) -> list[StoreWrite]:
    """The write of each part; none where an axis of the cache is no axis of theirs."""
    (factor,) = value.terms[0].factors
    shape, stacks = joint.outs[0].shape, joint.op is aten.stack.default
    walked = [walking(i, n) for i, n in zip(factor.axes, shape, strict=True)]
    walks = [atoms for atoms in walked if atoms is not None]
    if len(walks) < len(shape) or any(len(part.shape) + stacks != len(shape) for part in parts):
        return []
    dims: list[Axis] = [
        () if place is None else place if j in store.indexed else value.dims[place]
        for j, place in enumerate(store.places)
    ]
    sizes = [1 if stacks else part.shape[axis] for part in parts]
    if not stacks and walks[axis] in dims:
        caches = _cut(store.cache, dims.index(walks[axis]), sizes)
    else:
        caches, dims = _chosen(store.cache, dims, walks[axis], sizes)
        walks[axis : axis + 1] = [] if stacks else [walks[axis][1:]]
    axes: dict[Axis, int | None] = {**{atoms: r for r, atoms in enumerate(walks)}, (): None}
    tokens = [value.dims[token] for token in store.tokens]
    if any(not isinstance(x, int) and x not in axes for x in (*dims, *tokens)):
        return []
    return [
        dataclasses.replace(
            store,
            cache=cache,
            value=part,
            places=tuple(x if isinstance(x, int) else axes[x] for x in dims),
            indexed=frozenset(j for j, x in enumerate(dims) if isinstance(x, int)),
            tokens=tuple(t for x in tokens if (t := axes[x]) is not None),
            through={},
            joint=joint,
            behind=frozenset(store.through),
        )
        for cache, part in zip(caches, parts, strict=False)
    ]


def _cut(cache: Slot, d: int, sizes: Sequence[Size]) -> list[Slot]:
    """Both parts of a cache along the joined axis."""
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return []
    return [_range(cache, d, start, n) for start, n in zip((0, sizes[0]), sizes, strict=True)]


def _chosen(
    cache: Slot, dims: list[Axis], joined: Atoms, sizes: Sequence[Size]
) -> tuple[list[Slot], list[Axis]]:
    """Both parts of a cache with an axis of two that tells them apart, be it a part of one; and
    what walks their axes.
    """
    each = product(a.size for a in joined[1:])
    if not joined or joined[0].size != 2 or sizes != [each, each]:
        return [], dims
    for d, dim in enumerate(dims):
        if not isinstance(dim, int) and joined[0] in dim:
            place = dim.index(joined[0])
            groups = [x for x in (dim[:place], joined[:1], dim[place + 1 :]) if x]
            lengths = [product(a.size for a in x) for x in groups]
            if not all(isinstance(n, int) for n in lengths):
                break
            cache, at = _unflattened(cache, d, lengths), groups.index(joined[:1])
            del groups[at]
            parts = [_row(cache, d + at, i) for i in range(2)]
            return parts, [*dims[:d], *groups, *dims[d + 1 :]]
    return [], dims


# --- views that the graph does not take ----------------------------------------------------------


def _row(x: Slot, d: int, i: int) -> Slot:
    """x.select(d, i)"""
    shape, stride = (y[:d] + y[d + 1 :] for y in (x.shape, x.stride))
    offset = x.offset + i * x.stride[d]
    return _taken(x, aten.select.int, (d, i), shape=shape, stride=stride, offset=offset)


def _range(x: Slot, d: int, start: int, size: int) -> Slot:
    """x.narrow(d, start, size)"""
    shape = (*x.shape[:d], size, *x.shape[d + 1 :])
    offset = x.offset + start * x.stride[d]
    return _taken(x, aten.slice.Tensor, (d, start, start + size), shape=shape, offset=offset)


def _unflattened(x: Slot, d: int, sizes: Sequence[int]) -> Slot:
    """x.unflatten(d, sizes)"""
    if len(sizes) == 1:
        return x
    inner = [product(sizes[i + 1 :]) * x.stride[d] for i in range(len(sizes))]
    shape, stride = (
        (*y[:d], *new, *y[d + 1 :]) for y, new in ((x.shape, sizes), (x.stride, inner))
    )
    return _taken(x, aten.unflatten.int, (d, tuple(sizes)), shape=shape, stride=stride)


def _taken(x: Slot, op: Any, args: tuple[Any, ...], **fields: Any) -> Slot:
    """A view of x as the result of a call."""
    part = dataclasses.replace(x, **fields)
    part.call = Call(op, (x, *args), {}, x.node, (part,))
    return part
