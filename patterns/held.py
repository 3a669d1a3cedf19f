"""Held: a tensor as views of one that a node of the graph has as its result.

`kv[0, blocks, offsets] = rows` is one node, which takes a part of kv and writes to it. In comes the
part, out come the tensor it is taken from and the steps that take it. To add a view is one entry.
"""

from collections.abc import Callable, Container
from typing import Any

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.site import Step
from fxfuse.slots import Call, Slot

aten = torch.ops.aten


def held(slot: Slot, holder: Container[Slot]) -> tuple[Slot, tuple[Step, ...]]:
    """The nearest tensor before some views that a node holds, and those views as methods. Raises
    Refused where there is none.
    """
    steps: tuple[Step, ...] = ()
    while slot not in holder:
        call = slot.call
        taken = VIEWS[call.op](call) if call is not None and call.op in VIEWS else None
        if call is None or taken is None:
            how = f", by {call.op}" if call is not None else ""
            raise Refused(f"a part of a cache that is taken inside one call{how}")
        slot, steps = call.inputs()[0], (*taken, *steps)
    return slot, steps


def _select(call: Call) -> tuple[Step, ...] | None:
    _, dim, index = call.args
    return (("select", dim, index),) if isinstance(index, int) else None


def _slice(call: Call) -> tuple[Step, ...] | None:
    return _narrow(call, *call.args)


def _narrow(
    call: Call, x: Slot, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> tuple[Step, ...] | None:
    """Of elements that lie one behind the other, at places that are numbers."""
    size, length, start = x.shape[dim], call.outs[0].shape[dim], start or 0
    if isinstance(start, int) and start < 0 and isinstance(size, int):
        start = max(start + size, 0)
    known = isinstance(start, int) and isinstance(length, int) and start >= 0 and length > 0
    return (("narrow", dim, start, length),) if known and step == 1 else None


VIEWS: dict[Any, Callable[[Call], tuple[Step, ...] | None]] = {
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.unflatten.int: lambda call: (("unflatten", *call.args[1:]),),
    aten.unsqueeze.default: lambda call: (("unsqueeze", call.args[1]),),
    aten.alias.default: lambda call: (),
}
