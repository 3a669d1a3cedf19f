"""Cache writes: the ways a graph writes rows into a KV cache, one table entry each.

An entry reads one ATen call into `StoreWrite`s, or raises Refused. To add a way, write one function
under `@cache_layout(op)` and one test in tests/test_memory.py; an op of a library that writes rows
of k and v in one call is one line, see `fxfuse.register_store`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.casts import casts_of
from fxfuse.patterns.read import Reading
from fxfuse.patterns.site import CacheIndex, StoreWrite
from fxfuse.patterns.value import Size, product
from fxfuse.slots import Call, Slot

aten = torch.ops.aten

Negative: TypeAlias = Literal["invalid", "wrap", "skip"]
Writes: TypeAlias = "StoreWrite | Sequence[StoreWrite]"

LAYOUTS: dict[Any, Callable[[Call], Writes]] = {}
F = TypeVar("F", bound=Callable[[Call], Writes])

INTEGERS = (torch.int64, torch.int32)


def cache_layout(op: Any) -> Callable[[F], F]:
    """Enter a reader of one op's cache writes; it raises Refused for its other writes."""

    def register(read: F) -> F:
        LAYOUTS[op] = read
        return read

    return register


@cache_layout(aten.index_copy_.default)
def _index_copy(call: Call) -> StoreWrite:
    """cache.index_copy_(dim, slots, value)."""
    cache, dim, slots, value = call.args
    return rows_write(call, cache, dim % len(cache.shape), slots, value, "invalid")


@cache_layout(aten.index_put_.default)
def _index_put(call: Call) -> StoreWrite:
    """cache[.., blocks, .., offsets, ..] = value: whole rows, no accumulation."""
    cache, indices, value, *accumulate = call.args
    given = {d: i for d, i in enumerate(indices) if i is not None}
    if not given or any(accumulate) or call.kwargs.get("accumulate"):
        raise Refused("an index_put_ that is no plain write of rows")
    return indexed_write(call, cache, given, value, "wrap")


def rows_write(
    call: Call, cache: Slot, dim: int, slots: Slot, value: Slot, negative: Negative
) -> StoreWrite:
    """Rows at the slots along one axis of a cache, shaped as the cache but for that axis."""
    return indexed_write(call, cache, {dim: slots}, value, negative)


def indexed_write(
    call: Call, cache: Slot, indices: dict[int, Slot], value: Slot, negative: Negative
) -> StoreWrite:
    """Rows at one index, or several, of a cache's axes, as index_put_ has it: the rows' axes stand
    where the indices do, in front where those are no neighbours. Indices have an axis of tokens,
    behind one of batch rows or without it.
    """
    value = _before_setitem(call, value)
    dims = sorted(indices)
    for slots in indices.values():
        if slots.dtype not in INTEGERS or len(slots.shape) not in (1, 2):
            raise Refused(
                f"slots {list(slots.shape)} of {slots.dtype}, wanted integers [T] or [B, T]"
            )
    if len({slots.shape for slots in indices.values()}) > 1:
        raise Refused("indices of different shapes")
    order, wanted = rows_shape(cache, indices)
    lead = len(wanted) - len(value.shape)
    found = [1] * lead + list(value.shape[max(-lead, 0) :])
    if found != wanted or any(s != 1 for s in value.shape[: max(-lead, 0)]) or not value.shape:
        if lead == 0 and all(
            a == b or not isinstance(a, int) for a, b in zip(wanted, found, strict=True)
        ):
            raise Refused(
                f"rows of shape {found} where the cache takes {wanted}, which may not be equal"
            )
        raise Refused(f"rows of shape {list(value.shape)} where the cache takes {wanted}")
    axis = {d: i - lead if i >= lead else None for i, d in enumerate(order)}
    tokens = tuple(i - lead for i, d in enumerate(order) if d is None and i >= lead)
    read = [_resolved(call, indices[d]) for d in dims]
    if negative == "invalid" and any(index.modulus for index in read):
        # No index is below 0, but the slots that it is made of may be.
        negative = "wrap"
    places = [dims.index(d) if d in indices else axis[d] for d in range(len(cache.shape))]
    return StoreWrite(
        call, cache, value, tuple(places), frozenset(dims), tokens, tuple(read), negative
    )


def rows_shape(cache: Slot, indices: dict[int, Slot]) -> tuple[list[int | None], list[Size]]:
    """For each axis of the rows at some indices of one shape the cache's axis, None for those of
    the indices; and their sizes.
    """
    dims = sorted(indices)
    sizes = indices[dims[0]].shape
    free = [d for d in range(len(cache.shape)) if d not in indices]
    at = dims[0] if dims[-1] - dims[0] < len(dims) else 0
    order: list[int | None] = [*free[:at], *[None] * len(sizes), *free[at:]]
    wanted = [*(cache.shape[d] for d in free[:at]), *sizes, *(cache.shape[d] for d in free[at:])]
    return order, wanted


# What gives a tensor of batch rows and tokens one axis for both.
VECTORS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.select.int,
    }
)
# How an index is made of slots, as (divisor, modulus) of its number.
DIVISIONS: dict[Any, Callable[[int], tuple[int, int]]] = {
    aten.floor_divide.default: lambda n: (n, 0),
    aten.floor_divide.Scalar: lambda n: (n, 0),
    aten.remainder.Scalar: lambda n: (1, n),
    aten.remainder.Tensor: lambda n: (1, n),
    aten.bitwise_right_shift.Tensor_Scalar: lambda n: (1 << n, 0),
}


def _resolved(call: Call, slot: Slot) -> CacheIndex:
    """An index as what slots, divided by numbers, give: slots // divisor % modulus."""
    index = CacheIndex(slot, 1, 0, call)
    while (made := index.slots.call) is not None:
        step = _division(made)
        if step is None or made.inputs()[0].dtype not in INTEGERS:
            return index
        by, of = step
        # Outer steps so far: (x // by % of) // divisor % modulus.
        if of and of % index.divisor == 0 and (not index.modulus or _fits(of, index)):
            modulus = index.modulus or of // index.divisor
        elif not of:
            modulus = index.modulus
        else:
            return index
        between = (*index.made, index.slots)
        index = CacheIndex(made.inputs()[0], by * index.divisor, modulus, made, between)
    return index


def _fits(of: int, index: CacheIndex) -> bool:
    """Whether a modulus inside leaves the one outside as it is."""
    return (of // index.divisor) % index.modulus == 0


def _division(made: Call) -> tuple[int, int] | None:
    if made.op is aten._to_copy.default:
        same = made.outs[0].device == made.inputs()[0].device
        return (1, 0) if same and made.outs[0].dtype in INTEGERS else None
    if made.op in VECTORS:
        return (1, 0) if _is_whole_vector(made) else None
    if made.op is aten.div.Tensor_mode and made.kwargs.get("rounding_mode") == "floor":
        rule: Callable[[int], tuple[int, int]] | None = DIVISIONS[aten.floor_divide.default]
    else:
        rule = DIVISIONS.get(made.op)
    number = made.args[1] if rule is not None and len(made.args) == 2 else None
    positive = isinstance(number, int) and not isinstance(number, bool) and number > 0
    return rule(number) if rule is not None and positive and number is not None else None


def _is_whole_vector(view: Call) -> bool:
    """Whether a view has all elements of two axes in one, in their order."""
    before, after = view.inputs()[0].shape, view.outs[0].shape
    return (len(before), len(after)) == (2, 1) and product(before) == after[0]


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

    A cache is an input of the graph, seen as a whole or one of its parts, or memory the graph made.
    """
    stores: list[StoreWrite] = []
    refused: dict[Call, str] = {}
    for call in reading.view.calls:
        if call.op not in LAYOUTS:
            continue
        try:
            written = LAYOUTS[call.op](call)
            for store in [written] if isinstance(written, StoreWrite) else written:
                made = [slot for index in store.indices for slot in index.made]
                if any(reading.is_written(slot, call) for slot in made):
                    raise Refused("indices that are written before the store")
                stores += casts_of(reading, store)
        except Refused as reason:
            refused[call] = str(reason)
    return stores, refused
