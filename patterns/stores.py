"""Cache layouts: the ways a graph writes rows into a KV cache, one table entry each.

An entry reads one ATen call into a `StoreWrite`, or raises Refused. To add a layout, write one
function under `@cache_layout(op)` and one test in tests/test_memory.py.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.atoms import divide
from fxfuse.patterns.cut import seen_from
from fxfuse.patterns.read import Reading
from fxfuse.patterns.record import Pass, Store, Stream
from fxfuse.patterns.site import Access, Decoded, StoreWrite
from fxfuse.patterns.value import Atom, Index, Leaf
from fxfuse.slots import Call, Size, Slot

aten = torch.ops.aten

Negative: TypeAlias = Literal["invalid", "wrap"]

LAYOUTS: dict[Any, Callable[[Call], StoreWrite]] = {}
F = TypeVar("F", bound=Callable[[Call], StoreWrite])


def cache_layout(op: Any) -> Callable[[F], F]:
    """Enter a reader of one op's cache writes; it raises Refused for its other writes."""

    def register(read: F) -> F:
        LAYOUTS[op] = read
        return read

    return register


@cache_layout(aten.index_copy_.default)
def _index_copy(call: Call) -> StoreWrite:
    """cache.index_copy_(dim, slots, value), of [B, G, S, D] (dim 2) or [B, S, G, D] (dim 1)."""
    cache, dim, slots, value = call.args
    return rows_write(call, cache, dim % len(cache.shape), slots, value, "invalid")


@cache_layout(aten.index_put_.default)
def _index_put(call: Call) -> StoreWrite:
    """cache[:, :, slots] = value: an index on the token axis alone, no accumulation."""
    cache, indices, value, *accumulate = call.args
    given = [d for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or any(accumulate) or call.kwargs.get("accumulate"):
        raise Refused("an index_put_ that is no plain write of rows")
    return rows_write(call, cache, given[0], indices[given[0]], value, "wrap")


def rows_write(
    call: Call, cache: Slot, dim: int, slots: Slot, value: Slot, negative: Negative
) -> StoreWrite:
    """Whole rows at the slots of a [B, G, S, D] or [B, S, G, D] cache, the same for all of B; or of
    one without heads, [B, S, D], or without a batch, [S, G, D], as a paged cache's flat view.
    """
    rank = len(cache.shape)
    if len(value.shape) != rank or (rank, dim) not in ((4, 1), (4, 2), (3, 0), (3, 1)):
        axes = f"{len(value.shape)} axes along axis {dim} of a cache of {rank}"
        raise Refused(f"rows of {axes}, wanted three or four axes and a token axis")
    if slots.dtype not in (torch.int64, torch.int32) or len(slots.shape) != 1:
        raise Refused("slots that are no vector of integers")
    if cache.dtype != value.dtype:
        raise Refused(f"a cache of {cache.dtype} for rows of {value.dtype}")
    wanted = [*cache.shape[:dim], slots.shape[0], *cache.shape[dim + 1 :]]
    if list(value.shape) != wanted:
        raise Refused(f"rows of shape {list(value.shape)} where the cache takes {wanted}")
    record = Store(heads_first=dim == 2, negative=negative)
    return StoreWrite(call, cache, slots, value, record, None if rank == 4 else 2 * dim)


def find_stores(reading: Reading) -> tuple[list[StoreWrite], dict[Call, str]]:
    """The cache writes of a graph, in order, and why other writes of known ops are none.

    A cache is a whole input of the graph, or memory the graph made itself.
    """
    given = {slot.storage for slot in reading.values if slot.call is None}
    stores, refused = [], {}
    for call in reading.view.calls:
        if call.op not in LAYOUTS:
            continue
        try:
            store = LAYOUTS[call.op](call)
        except Refused as reason:
            refused[call] = str(reason)
            continue
        if store.cache.call is not None and store.cache.storage in given:
            refused[call] = "a cache that is a part of another tensor"
        else:
            stores.append(store)
    return stores, refused


def stored_copy(reading: Reading, store: StoreWrite) -> Decoded | None:
    """v as a stream: the stored rows as they are, if they are a plain view of one tensor of the
    graph.
    """
    value, slot = reading.values[store.value], store.value
    plain = len(value.terms) == 1 and len(value.terms[0].factors) == 1
    if not plain or set(value.terms[0].coefficients) != {1.0}:
        return None
    order = (0, 2, 1, 3) if store.record.heads_first else (0, 1, 2, 3)
    channels = slot.shape[-1]
    if not isinstance(channels, int):
        return None
    leaf = Leaf(
        -1,
        slot.shape,
        slot.dtype,
        reading.kinds[slot],
        slot,
        reading.versions_at(store.call, slot.storage),
    )
    stream = Stream(
        channels=channels,
        norm=None,
        rotation=None,
        passes=(Pass(0, 0, channels),),
        dtype=str(slot.dtype).removeprefix("torch."),
        keep=False,
    )
    b, t, h = (store.axis(i) for i in order[:3])
    steps = (*store.lifted(), ("permute", order))
    return Decoded(slot, value, stream, (b, t, h), Access(leaf, steps))


def rows_fit(reading: Reading, store: StoreWrite, decoded: Decoded) -> bool:
    """Whether the stored value is the whole stream, its axes the stream's batch, head and token
    axes in the cache's order.
    """
    order = (0, 2, 1) if store.record.heads_first else (0, 1, 2)
    value = seen_from(reading, decoded.slot, store.value)
    if value is None or len(value.terms) != 1 or len(value.dims) + len(store.lifted()) != 4:
        return False
    (factor,) = value.terms[0].factors
    walked = [
        _walked(index, size) for index, size in zip(factor.axes, factor.leaf.shape, strict=True)
    ]
    rows = [*(decoded.rows[i] for i in order), len(decoded.slot.shape) - 1]
    whole = [() if j is None else walked[j] for j in rows]
    stored = [() if (j := store.axis(i)) is None else value.dims[j] for i in range(4)]
    return None not in walked and stored == whole


def _walked(index: Index, size: Size) -> tuple[Atom, ...] | None:
    """The atoms that walk an axis from its first to its last element, in order."""
    reached: Size = 1
    for atom, stride in reversed(index.strides):
        if stride != reached:
            return None
        reached = reached * atom.size
    is_whole = not any(index.offsets) and divide(size, reached) == 1
    return tuple(a for a, _ in index.strides) if is_whole else None
