"""Cache layouts: the ways a graph writes rows into a KV cache, one table entry each.

An entry reads one ATen call into a `StoreWrite`, or says None. To add a layout, write a function under
`@cache_layout(op)` and a test in tests/test_stores.py.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch

from fxfuse.slots import Call, Slot
from fxfuse.patterns.read import Reading
from fxfuse.patterns.record import Pass, Store, Stream
from fxfuse.patterns.site import Access, Decoded, StoreWrite
from fxfuse.patterns.value import Leaf

aten = torch.ops.aten

LAYOUTS: dict[Any, Callable[[Call], StoreWrite | None]] = {}


def cache_layout(
    op: Any,
) -> Callable[[Callable[[Call], StoreWrite | None]], Callable[[Call], StoreWrite | None]]:
    def register(read: Callable[[Call], StoreWrite | None]) -> Callable[[Call], StoreWrite | None]:
        LAYOUTS[op] = read
        return read

    return register


@cache_layout(aten.index_copy_.default)
def _index_copy(call: Call) -> StoreWrite | None:
    """cache.index_copy_(dim, slots, value), along the third axis of [B, G, S, D] or the second of [B, S, G, D]."""
    cache, dim, slots, value = call.args
    return _write(call, cache, dim % len(cache.shape), slots, value, "invalid")


@cache_layout(aten.index_put_.default)
def _index_put(call: Call) -> StoreWrite | None:
    """cache[:, :, slots] = value: an index on the token axis alone, no accumulation."""
    cache, indices, value, *accumulate = call.args
    given = [d for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or any(accumulate) or call.kwargs.get("accumulate"):
        return None
    return _write(call, cache, given[0], indices[given[0]], value, "wrap")


def _write(
    call: Call,
    cache: Slot,
    dim: int,
    slots: Slot,
    value: Slot,
    negative: Literal["invalid", "wrap"],
) -> StoreWrite | None:
    is_index = slots.dtype in (torch.int64, torch.int32) and len(slots.shape) == 1
    if len(cache.shape) != 4 or dim not in (1, 2) or not is_index:
        return None
    rows = value.shape
    if len(rows) != 4 or rows[dim] != slots.shape[0] or cache.dtype != value.dtype:
        return None
    if any(rows[d] != cache.shape[d] for d in range(4) if d != dim):
        return None
    return StoreWrite(call, cache, slots, value, Store(heads_first=dim == 2, negative=negative))


def find_stores(reading: Reading) -> list[StoreWrite]:
    """The cache writes of a graph, in order: into a whole input, or into memory the graph made itself."""
    given = {slot.storage for slot in reading.values if slot.call is None}
    found = [LAYOUTS[c.op](c) for c in reading.view.calls if c.op in LAYOUTS]
    return [s for s in found if s and (s.cache.call is None or s.cache.storage not in given)]


def stored_copy(reading: Reading, store: StoreWrite) -> Decoded | None:
    """v as a stream: the stored rows as they are, if they are a plain view of one tensor of the graph."""
    value, slot = reading.values[store.value], store.value
    plain = len(value.terms) == 1 and len(value.terms[0].factors) == 1
    if not plain or set(value.terms[0].coefficients) != {1.0} or len(value.dims) != 4:
        return None
    order = (0, 2, 1, 3) if store.record.heads_first else (0, 1, 2, 3)
    channels = slot.shape[3]
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
    rows = (0, 2, 1) if store.record.heads_first else (0, 1, 2)
    return Decoded(slot, value, stream, rows, Access(leaf, (("permute", order),)))
