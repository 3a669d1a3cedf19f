"""Attention calls seen from behind: the norms of the q and k that they read unrotated."""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.cut import origin_of
from fxfuse.patterns.norms import read_statistic
from fxfuse.patterns.read import Reading
from fxfuse.patterns.site import StoreWrite
from fxfuse.patterns.value import Leaf, Size, Value, is_statistic
from fxfuse.slots import Call, Slot, slots_of

aten = torch.ops.aten

ATTENTION = (aten.scaled_dot_product_attention.default, aten.matmul.default)
NAMES = ("query", "key", "value")

# The attention call that reads a normed value, and as which operand: 0 for q, 1 for k.
Reader: TypeAlias = tuple[Call, int]


def operand_index(call: Call, slot: Slot) -> int | None:
    """Which operand of an attention call a slot is."""
    given = dict(zip(NAMES, call.args, strict=False)) | call.kwargs
    return next((i for i, name in enumerate(NAMES) if given.get(name) is slot), None)


def statistic_in(value: Value) -> Leaf | None:
    """The row statistic that multiplies a single product with data in it."""
    if len(value.terms) != 1 or not value.sources():
        return None
    found = [f.leaf for f in value.terms[0].factors if is_statistic(f.leaf)]
    return found[0] if len(found) == 1 else None


def normed_operands(reading: Reading, stores: Sequence[StoreWrite]) -> dict[Leaf, Reader]:
    """By their row statistic, the q and k of each attention that are both normed by head, not
    rotated.
    """
    readers: dict[Leaf, Reader] = {}
    written: dict[int, list[StoreWrite]] = {}
    for store in stores:
        written.setdefault(store.cache.storage, []).append(store)
    for call in reading.view.calls:
        if call.op not in ATTENTION:
            continue
        given = dict(zip(NAMES, call.args, strict=False)) | call.kwargs
        q, k = (given.get(name) for name in NAMES[:2])
        if not isinstance(q, Slot) or not isinstance(k, Slot) or not q.shape:
            continue
        at = reading.positions[call]
        found = [_statistics(reading, written, slot, at) for slot in (q, k)]
        found = [[x for x in side if _is_over(x, q.shape[-1])] for side in found]
        if all(found):
            readers |= {leaf: (call, i) for i, side in enumerate(found) for leaf in side}
    return readers


def stored_statistics(reading: Reading, stores: Sequence[StoreWrite]) -> set[Leaf]:
    """The row statistics of rows that are normed, not rotated, on their way into a cache."""
    origins = (origin_of(reading, store.value, store.through) for store in stores)
    found = (statistic_in(reading.values[slot]) for slot in origins)
    return {leaf for leaf in found if leaf is not None}


def _is_over(leaf: Leaf, channels: Size) -> bool:
    """Whether a statistic is one of as many channels as a head has."""
    try:
        return bool(read_statistic(leaf).count == channels)
    except Refused:
        return False


def _statistics(
    reading: Reading, written: dict[int, list[StoreWrite]], slot: Slot, before: int
) -> list[Leaf]:
    """The row statistics of a slot, seen through views, joints with other tokens, and caches."""
    while True:
        leaf = statistic_in(reading.values[slot])
        if leaf is not None:
            return [leaf]
        at = reading.positions
        stores = [s for s in written.get(slot.storage, ()) if at[s.call] < before]
        if stores:
            slot, before = stores[-1].value, at[stores[-1].call]
            continue
        call = slot.call
        if call is None:
            return []
        if call.op == aten.cat.default:
            parts = slots_of(call.args[0])
            return [x for s in parts for x in _statistics(reading, written, s, at[call])]
        if reading.relations.get(call) not in ("view", "same"):
            return []
        slot, before = call.inputs()[0], at[call]
