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


# Where tokens are, by a cache's rank and its token axis: the axis of four that it does not have.
MISSING: dict[tuple[int, int], int | None] = {(4, 1): None, (4, 2): None, (3, 0): 0, (3, 1): 2}
TOKEN_AXES = "axis 1 or 2 of four, or 0 or 1 of three"
AXES = ("batch", "tokens", "heads", "channels")


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
    value = _before_setitem(call, value)
    rank, lead = len(cache.shape), len(cache.shape) - len(value.shape)
    if (rank, dim) not in MISSING:
        shape = list(cache.shape)
        raise Refused(f"rows along axis {dim} of a cache of shape {shape}, wanted {TOKEN_AXES}")
    if slots.dtype not in (torch.int64, torch.int32) or len(slots.shape) != 1:
        raise Refused(f"slots {list(slots.shape)} of {slots.dtype}, wanted a vector of integers")
    if cache.dtype != value.dtype:
        raise Refused(f"a cache of {cache.dtype} for rows of {value.dtype}")
    wanted = [*cache.shape[:dim], slots.shape[0], *cache.shape[dim + 1 :]]
    found = [1] * lead + list(value.shape[max(-lead, 0) :])
    if found != wanted or any(s != 1 for s in value.shape[: max(-lead, 0)]) or not value.shape:
        raise Refused(f"rows of shape {list(value.shape)} where the cache takes {wanted}")
    record = Store(heads_first=dim == 2, negative=negative)
    return StoreWrite(call, cache, slots, value, record, MISSING[rank, dim], lead)


def _before_setitem(call: Call, value: Slot) -> Slot:
    """Rows as the graph holds them: Python's `cache[slots] = rows` drops their leading axes of
    size 1 inside of its call.
    """
    made = value.call
    if made is None or made.node is not call.node or made.op is not aten.view.default:
        return value
    rows = made.inputs()[0]
    dropped = len(rows.shape) - len(value.shape)
    same = dropped > 0 and rows.shape == (1,) * dropped + value.shape
    return rows if same else value


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
    steps = (*store.lifted_value(), ("permute", order))
    return Decoded(slot, value, stream, (b, t, h), Access(leaf, steps))


def check_rows(reading: Reading, store: StoreWrite, decoded: Decoded) -> None:
    """Raises Refused unless the stored value is the whole stream, its axes the stream's batch, head
    and token axes in the cache's order.
    """
    order = (0, 2, 1) if store.record.heads_first else (0, 1, 2)
    value = seen_from(reading, decoded.slot, store.value)
    if value is None or len(value.terms) != 1:
        raise Refused("stored rows that are no view of the rotated ones")
    (factor,) = value.terms[0].factors
    shape = list(decoded.slot.shape)
    walked = [_walked(index, size) for index, size in zip(factor.axes, shape, strict=True)]
    if None in walked:
        raise Refused(f"rows of shape {list(store.value.shape)} that are a part of {shape}")
    rows = [*(decoded.rows[i] for i in order), len(shape) - 1]
    whole = [() if j is None else walked[j] for j in rows]
    stored = [() if (j := store.axis(i)) is None else value.dims[j] for i in range(4)]
    if stored != whole:
        names = {atoms: AXES[i] for atoms, i in zip(whole, (*order, 3), strict=True) if atoms}
        found = [names.get(atoms, "others" if atoms else "1") for atoms in stored]
        wanted = [AXES[i] for i in (*order, 3)]
        raise Refused(
            f"rows of axes {_kept(found, store)} where the cache has {_kept(wanted, store)}"
        )


def _kept(names: list[str], store: StoreWrite) -> str:
    """Of names of four axes those that the cache has."""
    return f"[{', '.join(name for i, name in enumerate(names) if i != store.missing)}]"


def _walked(index: Index, size: Size) -> tuple[Atom, ...] | None:
    """The atoms that walk an axis from its first to its last element, in order."""
    reached: Size = 1
    for atom, stride in reversed(index.strides):
        if stride != reached:
            return None
        reached = reached * atom.size
    is_whole = not any(index.offsets) and divide(size, reached) == 1
    return tuple(a for a, _ in index.strides) if is_whole else None
