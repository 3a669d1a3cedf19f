"""Rearrangements: a tensor that is made of another one's elements, read back to it.

    cos = torch.cat([m[i] for i, m in enumerate(rows.split((4, 2, 2), -1))], -1)

On tables the reader stops at such a call, for what it makes is loaded as it is. Here it is read
through: in comes a slot, out comes its Value over the results of the calls that `stop` names, or
`Opaque` where an element on the way is computed or written.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import map_aggregate

from fxfuse.patterns.chosen import CHOICES, chosen
from fxfuse.patterns.read import Reading
from fxfuse.patterns.transfer import TRANSFERS, transferred
from fxfuse.patterns.value import Kind, Leaf, Opaque, Value, leaf_value
from fxfuse.slots import Call, Slot

aten = torch.ops.aten

# Arithmetic by the reader's book, though every element of their results is one of an operand's.
JOINTS = frozenset(
    {
        aten.cat.default,
        aten.flip.default,
        aten.roll.default,
        aten.select_scatter.default,
        aten.slice_scatter.default,
        aten.stack.default,
    }
)


def rearranged(slot: Slot, reading: Reading, stop: Callable[[Call], bool]) -> Value:
    """The Value of a slot over leaves that are results of calls that `stop` names. Raises
    Opaque.
    """
    found: dict[Slot, Value] = {}

    def value(slot: Slot) -> Value:
        if slot not in found:
            found[slot] = made(slot)
        return found[slot]

    def made(slot: Slot) -> Value:
        call = slot.call
        if call is None:
            raise Opaque("a tensor that came into the graph")
        if stop(call):
            return leaf_value(Leaf(-1, slot.shape, slot.dtype, Kind.TABLE, slot))
        _check_call(call, reading)
        if call.op in CHOICES:
            return chosen(value(call.args[0]), call, reading.writes)
        args, kwargs = map_aggregate(
            (call.args, call.kwargs), lambda x: value(x) if isinstance(x, Slot) else x
        )
        values = transferred(call, args, kwargs, _no_name, _no_name)
        return values[call.outs.index(slot)]

    return value(slot)


def _check_call(call: Call, reading: Reading) -> None:
    """Raises Opaque unless the call only moves the elements that its operands were made with."""
    entry = TRANSFERS.get(call.op)
    relation = entry.relation if entry is not None else ""
    if not (relation in ("view", "same") or call.op in JOINTS or call.op in CHOICES) or call.writes:
        raise Opaque(f"{call.op} does not only move elements")
    for operand in call.inputs():
        if operand.dtype.is_floating_point and not all(is_wide(out.dtype) for out in call.outs):
            raise Opaque("a cast to another sort of number")
        if any(out.device != operand.device for out in call.outs):
            raise Opaque("a tensor that moves to another device")
        if operand.call is None or reading.is_written(operand, call):
            raise Opaque("a tensor that is written before it is read")


def is_wide(dtype: torch.dtype) -> bool:
    """Whether a dtype is a float of 16 bits or more: a cast to it may round, as an op's inputs do
    that rounds once, at its end.
    """
    return dtype.is_floating_point and dtype.itemsize > 1


def _no_name(*_: Any) -> Value:
    raise Opaque("a number that is computed")
