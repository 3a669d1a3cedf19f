"""Cut: a Value read anew from a tensor in its midst, for a chain whose whole does not decode.

Between a rotation and its projection may stand what no record holds, a norm of another kind say. A
tensor that all of a chain's data passes through can be the stream's input as well as the
projection can: what comes before it stays the model's.
"""

import heapq
from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch.fx.node import map_aggregate

from fxfuse.patterns.read import Reading
from fxfuse.patterns.transfer import transferred
from fxfuse.patterns.value import Definition, Kind, Opaque, Value, leaf_value
from fxfuse.slots import Call, Scalar, Slot

MAX_CALLS = 96
NOTHING: Mapping[Call, Slot] = MappingProxyType({})


def cuts(reading: Reading, slot: Slot) -> Iterator[Value]:
    """The slot's Value over each tensor that all its data passes through, the nearest first."""
    for waist, between in _waists(reading, slot):
        try:
            yield _read_from(reading, waist, between, slot)
        except Opaque:
            continue


def origin_of(
    reading: Reading,
    slot: Slot,
    through: Mapping[Call, Slot] = NOTHING,
    ends: Container[Slot] = (),
) -> Slot:
    """What views, and the calls of `through`, make a slot of: the nearest of `ends`, or what no
    view makes.
    """
    while slot not in ends and (call := slot.call) is not None:
        if call not in through and reading.relations.get(call) != "view":
            break
        slot = through.get(call) or call.inputs()[0]
    return slot


def seen_from(
    reading: Reading, origin: Slot, slot: Slot, through: Mapping[Call, Slot] = NOTHING
) -> Value | None:
    """The Value of a slot that views make of another, over that one as a leaf. The calls of
    `through` count as views of their tensor.
    """
    between = []
    call = slot.call
    while slot is not origin and call is not None and call not in between:
        between.append(call)
        before = through.get(call, call.inputs()[0])
        call = before.call
        if before is origin:
            break
    try:
        return _read_from(reading, origin, between[::-1], slot, through)
    except Opaque:
        return None


def _waists(reading: Reading, slot: Slot) -> Iterator[tuple[Slot, list[Call]]]:
    """Each such tensor, and the calls that make the slot from it, in order. Inputs of the graph
    are not followed: a table that came from outside may be among them.
    """
    at = reading.positions
    waiting = [(-at[slot.call], id(slot), slot)] if slot.call else []
    seen = {slot}
    between: dict[Call, None] = {}
    while waiting and len(between) < MAX_CALLS:
        _, _, last = heapq.heappop(waiting)
        if between and not waiting:
            yield last, sorted(between, key=at.__getitem__)
        call = last.call
        if call is None or call not in reading.relations:
            return
        between[call] = None
        for x in call.inputs():
            if x not in seen and reading.kinds[x] is Kind.DATA and x.call is not None:
                seen.add(x)
                heapq.heappush(waiting, (-at[x.call], id(x), x))


def _read_from(
    reading: Reading,
    waist: Slot,
    between: list[Call],
    slot: Slot,
    through: Mapping[Call, Slot] = NOTHING,
) -> Value:
    """The slot's Value with the waist as a leaf; `through` as in `seen_from`."""
    if waist.dtype.is_complex:
        raise Opaque("a complex tensor")
    version = _version(reading, waist)
    leaf = reading.leaf(waist.shape, waist.dtype, Kind.DATA, waist, version=version)
    values = {waist: leaf_value(leaf)}

    def name(out: Slot, definition: Definition, shape: Any) -> Value:
        if shape is not None or definition.op == "sum":
            return reading.nameless(definition, shape)
        return leaf_value(
            reading.leaf(
                out.shape,
                out.dtype,
                Kind.DATA,
                out,
                version=_version(reading, out),
                definition=definition,
            )
        )

    for call in between:
        if call in through:
            before = through[call]
            if reading.versions_at(call, before.storage) != _version(reading, before):
                raise Opaque("a tensor that was written to since it was made")
            values[call.outs[0]] = values[before]
            continue

        def argument(x: Any, call: Call = call) -> Any:
            if isinstance(x, Scalar):
                return reading.number(x)
            if not isinstance(x, Slot):
                return x
            if reading.versions_at(call, x.storage) != _version(reading, x):
                raise Opaque("a tensor that was written to since it was made")
            return values.get(x, reading.values[x])

        args, kwargs = map_aggregate((call.args, call.kwargs), argument)
        made = transferred(call, args, kwargs, name, reading.number)
        values.update(zip(call.outs, made, strict=True))
    return values[slot]


def _version(reading: Reading, slot: Slot) -> int:
    """The version of its storage that a slot was made with."""
    return reading.versions_at(slot.call, slot.storage) if slot.call else 0
