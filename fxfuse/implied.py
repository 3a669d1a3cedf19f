"""Implied: sizes that a call of the graph checks when it runs are equal, and Dynamo did not note.

`cache[slots] = k` raises unless there are as many slots as rows, or one row alone; index_copy_
unless rows and cache agree in every axis. Their fake implementations ask nothing (index_copy_'s
does from torch 2.13 on). In comes the graph, out go guards to the shape environment: what they
exclude would raise. Only where Dynamo compiles, for there guards are checked before each run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxfuse.patterns.stores import rows_shape
from fxfuse.slots import Call, Size, Slot, View
from fxfuse.torch_private import are_guarded, guard_equal

aten = torch.ops.aten

# Two sizes, and what the second is at least where that tells them to be equal.
Pair = tuple[Size, Size, int]


def guarded(gm: fx.GraphModule, view: View) -> bool:
    """Tell the shape environment what writes by index imply; whether there was any of it."""
    if not are_guarded(gm):
        return False
    implied = [(call, IMPLIED[call.op](call)) for call in view.calls if call.op in IMPLIED]
    return any([guard_equal(call.node, *pair) for call, pairs in implied for pair in pairs])


def _index_put(call: Call) -> list[Pair]:
    """The sizes that only the run knows, of rows that are written and of the indices they go to."""
    cache, indices, value = call.args[:3]
    given = {d: i for d, i in enumerate(indices) if i is not None}
    if len({i.shape for i in given.values()}) != 1 or any(
        i.dtype == torch.bool for i in given.values()
    ):
        return []
    pairs = _unlike(cache, given, value)
    # One row alone may go to all slots, and a number here is an axis of one row.
    known = any(isinstance(size, int) for pair in pairs for size in pair)
    return [] if known else [(a, b, 2) for a, b in pairs]


def _index_copy(call: Call) -> list[Pair]:
    cache, dim, slots, value = call.args
    given = {dim % len(cache.shape): slots} if len(slots.shape) == 1 else {}
    return [(a, b, 0) for a, b in _unlike(cache, given, value)] if given else []


def _unlike(cache: Slot, given: dict[int, Slot], value: Slot) -> list[tuple[Size, Size]]:
    """Sizes that the rows have, where the cache and the indices have others."""
    _, wanted = rows_shape(cache, given)
    if len(value.shape) != len(wanted):
        return []
    return [(a, b) for a, b in zip(wanted, value.shape, strict=True) if a != b]


IMPLIED: dict[Any, Callable[[Call], list[Pair]]] = {
    aten.index_put_.default: _index_put,
    aten.index_copy_.default: _index_copy,
}
