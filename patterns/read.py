"""Read: one forward pass of abstract interpretation over the lens's calls; every slot gets a Value.

Memory comes before algebra. Each storage has a version; a write raises it; a slot whose storage has
been written since its Value was made is a fresh leaf of the present version, through whatever alias
it is read.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

import fxfuse.patterns.transfer_arithmetic
import fxfuse.patterns.transfer_shapes  # noqa: F401  these two fill the table
from fxfuse.patterns import arithmetic
from fxfuse.patterns.transfer import (
    NOT_FORESEEN,
    TRANSFERS,
    Relation,
    is_exact_cast,
    transferred,
)
from fxfuse.patterns.value import (
    Definition,
    Kind,
    Leaf,
    Opaque,
    Size,
    Value,
    constant,
    leaf_value,
)
from fxfuse.slots import Call, Scalar, Slot, View, slots_of

aten = torch.ops.aten

# Their results are data, also of weights alone; of tables alone they are a table, and so is what an
# embedding has for positions that no input of the graph has a say in.
PROJECTIONS = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.addmm.default,
        aten.einsum.default,
        aten.embedding.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.scaled_dot_product_attention.default,
    }
)


# What a scale by output channel and a bias behind a quantised projection are spelled with.
EPILOGUES = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor})

# Their results are tables, whatever their operands depend on: turns, and memory with nothing in it.
TABLES = frozenset(
    {
        aten.cos.default,
        aten.sin.default,
        aten.polar.default,
        aten.empty_like.default,
        aten.new_empty.default,
    }
)


@dataclasses.dataclass
class Reading:
    """What the reader found: a Value and a Kind for each slot, and each storage's writes by call
    position.
    """

    view: View
    values: dict[Slot, Value]
    kinds: dict[Slot, Kind]
    relations: dict[Call, Relation]
    reasons: dict[Call, str]
    writes: dict[int, list[int]]
    positions: dict[Call, int]
    leaves: list[Leaf]
    centred: dict[Any, Leaf] = dataclasses.field(default_factory=dict)

    def versions_at(self, call: Call, storage: int) -> int:
        """A storage's version when a call reads it."""
        return sum(w < self.positions[call] for w in self.writes.get(storage, ()))

    def is_written(self, slot: Slot, before: Call) -> bool:
        """Whether a tensor's memory is written between the call that made it and another."""
        assert slot.call is not None
        made, end = self.positions[slot.call], self.positions[before]
        return any(made < write < end for write in self.writes.get(slot.storage, ()))

    def views_of(self, slot: Slot) -> list[Call]:
        """The calls through which a tensor is a view of another, in order."""
        views: list[Call] = []
        while slot.call is not None and self.relations.get(slot.call) == "view":
            views.insert(0, slot.call)
            slot = slot.call.inputs()[0]
        return views

    def viewed(self, slot: Slot) -> Slot:
        """What a tensor is a view of, or the tensor itself."""
        views = self.views_of(slot)
        return views[0].inputs()[0] if views else slot

    def leaf(
        self, shape: tuple[Size, ...], dtype: torch.dtype, kind: Kind, slot: Any, **more: Any
    ) -> Leaf:
        """A new leaf; its number is its own."""
        leaf = Leaf(len(self.leaves), shape, dtype, kind, slot, **more)
        self.leaves.append(leaf)
        return leaf

    def nameless(self, definition: Definition, shape: Any = None) -> Value:
        """A leaf that no node holds, with a definition; shaped as its operand unless told. The
        centred rows of one value have one name.
        """
        operand = definition.operands[0]
        shape = operand.shape if shape is None else shape
        key = (id(operand.terms), operand.dims)
        if definition.op == "centred" and key in self.centred:
            return leaf_value(self.centred[key])
        leaf = self.leaf(shape, operand.dtype, Kind.DATA, None, definition=definition)
        if definition.op == "centred":
            self.centred[key] = leaf
        return leaf_value(leaf)

    def number(self, x: Any) -> Value:
        """A number of the graph as a Value."""
        if isinstance(x, (int, float, complex)):
            return constant(x, torch.float64)
        if not isinstance(x, Scalar):
            raise Opaque("a number computed in the graph")
        return leaf_value(self.leaf((), torch.float64, Kind.TABLE, x))


class _Reader:
    def __init__(self, view: View, kinds: Mapping[fx.Node, Kind]) -> None:
        self.given = kinds
        self.versions: dict[int, int] = {}
        self.made: dict[Slot, int] = {}
        self.leaf_of: dict[tuple[Slot, int, str], Leaf] = {}
        self.calls: dict[Any, Call] = {}
        self.twins: dict[Slot, Slot] = {}
        self.constants: set[Slot] = set()
        self.products: set[Slot] = set()
        self.readers = Counter(slot for call in view.calls for slot in call.inputs())
        self.reading = Reading(view, {}, {}, {}, {}, {}, {}, [])

    def read(self) -> Reading:
        for node, result in self.reading.view.results.items():
            if node.op in ("placeholder", "get_attr"):
                for slot in slots_of(result):
                    self._given(slot, self.given.get(node, Kind.DATA))
        for position, call in enumerate(self.reading.view.calls):
            self.reading.positions[call] = position
            self._call(call)
            for slot in call.writes:
                self._write(slot.storage, position)
            for slot in call.outs:
                self.made[slot] = self.versions.get(slot.storage, 0)
        return self.reading

    def _given(self, slot: Slot, kind: Kind) -> None:
        self.made[slot] = 0
        self.reading.kinds[slot] = kind
        self.reading.values[slot] = self._leaf(slot)

    def _write(self, storage: int, position: int) -> None:
        self.versions[storage] = self.versions.get(storage, 0) + 1
        self.reading.writes.setdefault(storage, []).append(position)

    def _leaf(self, slot: Slot, definition: Definition | None = None) -> Value:
        """The slot as a leaf of its storage's present version; a complex tensor is re + 1j * im."""
        if slot.dtype.is_complex:
            real, imag = (leaf_value(self._new_leaf(slot, part)) for part in ("re", "im"))
            return arithmetic.add(real, arithmetic.scaled(imag, 1j), slot.dtype)
        return leaf_value(self._new_leaf(slot, "", definition))

    def _new_leaf(self, slot: Slot, part: str, definition: Definition | None = None) -> Leaf:
        key = (slot, self.versions.get(slot.storage, 0), part)
        if key not in self.leaf_of or definition is not None:
            kind = self.reading.kinds[slot]
            self.leaf_of[key] = self.reading.leaf(
                slot.shape, slot.dtype, kind, slot, version=key[1], part=part, definition=definition
            )
        return self.leaf_of[key]

    def _value(self, slot: Slot) -> Value:
        if self.made[slot] == self.versions.get(slot.storage, 0):
            return self.reading.values[slot]
        return self._leaf(slot)

    def _call(self, call: Call) -> None:
        kind = self._kind(call)
        if call.op is not None and self.constants.issuperset(call.inputs()):
            self.constants.update(call.outs)
        for slot in call.outs:
            self.reading.kinds[slot] = kind
        if kind is Kind.DATA and self._is_projection(call):
            self.products.update(call.outs)
        twin = self._twin(call) if kind is not Kind.DATA else None
        if twin is not None:
            self.twins.update(zip(call.outs, twin.outs, strict=True))
            for slot, first in zip(call.outs, twin.outs, strict=True):
                self.reading.values[slot] = self.reading.values[first]
            if twin in self.reading.relations:
                self.reading.relations[call] = self.reading.relations[twin]
            return
        try:
            values = self._transfer(call, kind)
        except (Opaque, *NOT_FORESEEN) as reason:
            self.reading.reasons[call] = str(reason)
            values = None
        if values is None:
            self.reading.relations.pop(call, None)
            values = [self._leaf_after(call, slot) for slot in call.outs]
        self.reading.values.update(zip(call.outs, values, strict=True))

    def _leaf_after(self, call: Call, slot: Slot) -> Value:
        """A leaf for an opaque result; if the call writes to its storage, the leaf is of the
        version after.
        """
        if any(w.storage == slot.storage for w in call.writes):
            version = self.versions.get(slot.storage, 0)
            self.versions[slot.storage] = version + 1
            leaf = self._leaf(slot)
            self.versions[slot.storage] = version
            return leaf
        return self._leaf(slot)

    def _kind(self, call: Call) -> Kind:
        if call.op in TABLES:
            return Kind.TABLE
        kinds = {self._slot_kind(x) for x in call.inputs()}
        if call.op is None or Kind.DATA in kinds:
            return Kind.DATA
        if call.op is aten.embedding.default and call.args[0] in self.constants:
            return Kind.TABLE
        if call.op in PROJECTIONS and Kind.WEIGHT in kinds:
            return Kind.DATA
        return Kind.WEIGHT if kinds == {Kind.WEIGHT} else Kind.TABLE

    def _slot_kind(self, slot: Slot) -> Kind:
        return self.reading.kinds[slot]

    def _transfer(self, call: Call, kind: Kind) -> list[Value] | None:
        entry = TRANSFERS.get(call.op)
        if entry is None or call.writes or not call.outs or _moves(call):
            return None
        if self.products.issuperset(call.outs):
            return None
        args, kwargs = map_aggregate((call.args, call.kwargs), self._argument)
        if kind is not Kind.DATA and self._is_leaf_arithmetic(call, entry.relation, args):
            out = call.outs[0]
            return [self._leaf(out, _offset(call, args))] if len(call.outs) == 1 else None
        values = transferred(call, args, kwargs, self._name, self.reading.number)
        self.reading.relations[call] = entry.relation
        return values

    def _is_projection(self, call: Call) -> bool:
        """Whether a call's result is a product with a weight: that itself, or the whole of one that
        nobody else reads, scaled or shifted by output channel. A raw product with other readers
        may be what a norm takes its statistic of.
        """
        slots = call.inputs()
        others = [s for s in slots if self.reading.kinds[s] is not Kind.DATA]
        if call.op in PROJECTIONS:
            return bool(others)
        data = [s for s in slots if s not in others]
        if call.op not in EPILOGUES or len(data) != 1 or len(others) != 1 or call.kwargs:
            return False
        by_channel = all(size == 1 for size in others[0].shape[:-1])
        same = call.outs[0].shape == data[0].shape
        return data[0] in self.products and self.readers[data[0]] == 1 and by_channel and same

    def _twin(self, call: Call) -> Call | None:
        """An earlier call on tables or weights that gave the same tensors, if nobody has written
        to them since: layers that make the same table share one.
        """
        if call.writes or not call.inputs() or torch.Tag.nondeterministic_seeded in _tags(call.op):
            return None
        slots = tuple(
            (self.twins.get(s, s), self.versions.get(s.storage, 0)) for s in call.inputs()
        )
        first = self.calls.setdefault((call.op, repr(_without_slots(call)), slots), call)
        if first is call or len(first.outs) != len(call.outs):
            return None
        fresh = all(self.made[s] == self.versions.get(s.storage, 0) for s in first.outs)
        return first if fresh else None

    def _is_leaf_arithmetic(self, call: Call, relation: Relation, args: Any) -> bool:
        """Tables and weights: arithmetic and rounding on them stay outside and are loaded as they
        are.
        """
        if relation == "same":
            return not is_exact_cast(args[0].dtype, call.outs[0].dtype)
        return relation == "compute"

    def _argument(self, x: Any) -> Any:
        if isinstance(x, Slot):
            return self._value(x)
        return self.reading.number(x) if isinstance(x, Scalar) else x

    def _name(self, slot: Slot, definition: Definition, shape: Any) -> Value:
        if shape is None and definition.op != "sum":
            return self._leaf(slot, definition)
        return self.reading.nameless(definition, shape)


def _moves(call: Call) -> bool:
    """Whether a result lies on another device than what it is made of."""
    devices = {slot.device for slot in call.inputs()}
    return bool(devices) and call.outs[0].device not in devices


def _tags(op: Any) -> Any:
    return getattr(op, "tags", ())


def _without_slots(call: Call) -> Any:
    """A call's constants, in their places."""
    return map_aggregate((call.args, call.kwargs), lambda x: "" if isinstance(x, Slot) else x)


def _offset(call: Call, args: Any) -> Definition | None:
    """The definition of weight + number, which a norm takes in."""
    if call.op is not aten.add.Tensor or len(args) != 2 or call.kwargs:
        return None
    x, number = args if isinstance(args[0], Value) else args[::-1]
    if not isinstance(x, Value) or not isinstance(number, (int, float)):
        return None
    return Definition("offset", (x,), (number,)) if call.outs[0].dtype == torch.float32 else None


def read(view: View, kinds: Mapping[fx.Node, Kind]) -> Reading:
    """Read a graph; `kinds` tells for each placeholder what it holds (default: data)."""
    return _Reader(view, kinds).read()
