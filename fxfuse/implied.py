"""Implied: sizes that a call of the graph checks when it runs are equal, and Dynamo did not note.

`cache[slots] = k` raises unless there are as many slots as rows, or one row alone; its fake
implementation asks nothing. In comes the graph, out go guards to the shape environment: what they
exclude would raise. Only where Dynamo compiles, for there guards are checked before each run.
"""

import torch
from torch import fx

from fxfuse.patterns.stores import rows_shape
from fxfuse.slots import Call, Size, View
from fxfuse.torch_private import are_guarded, guard_equal

aten = torch.ops.aten


def guarded(gm: fx.GraphModule, view: View) -> bool:
    """Tell the shape environment what writes by index imply; whether there was any of it."""
    if not are_guarded(gm):
        return False
    pairs = [
        (call.node, *pair)
        for call in view.calls
        if call.op is aten.index_put_.default
        for pair in _implied(call)
    ]
    return any([guard_equal(node, *pair) for node, *pair in pairs])


def _implied(call: Call) -> list[tuple[Size, Size]]:
    """The sizes that only the run knows, of rows that are written and of the indices they go to."""
    cache, indices, value = call.args[:3]
    given = {d: i for d, i in enumerate(indices) if i is not None}
    if len({i.shape for i in given.values()}) != 1 or any(
        i.dtype == torch.bool for i in given.values()
    ):
        return []
    _, wanted = rows_shape(cache, given)
    if len(value.shape) != len(wanted):
        return []
    pairs = [(a, b) for a, b in zip(wanted, value.shape, strict=True) if a != b]
    known = any(isinstance(size, int) for pair in pairs for size in pair)
    return [] if known else pairs
