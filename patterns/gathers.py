"""Gathers: the calls that take rows of a table by position.

In comes a call, out come the table and the positions. An op more is one entry.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from fxfuse.slots import Call, Slot

aten = torch.ops.aten

# Table and positions, None where the op takes something else.
Read: TypeAlias = Callable[..., "tuple[Slot, Slot] | None"]


def _indexed(table: Slot, indices: Sequence[Any]) -> tuple[Slot, Slot] | None:
    return (table, indices[0]) if len(indices) == 1 and isinstance(indices[0], Slot) else None


def _embedded(a: Slot, b: Slot, *_: Any) -> tuple[Slot, Slot]:
    """F.embedding has the index first, aten.embedding the table."""
    return (b, a) if b.dtype.is_floating_point else (a, b)


GATHERS: dict[Any, Read] = {
    aten.index.Tensor: _indexed,
    aten.index_select.default: lambda table, dim, index: (table, index) if dim == 0 else None,
    aten.embedding.default: _embedded,
}


def gathered(call: Call) -> tuple[Slot, Slot] | None:
    """Table and positions of a call that takes rows; None of another call."""
    read = GATHERS.get(call.op)
    return read(*call.args) if read is not None and not call.kwargs else None
