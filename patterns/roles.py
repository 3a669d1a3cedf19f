"""Roles: the factors of a value that may be a stream, sorted into source, tables, weight, statistic
and row scale by what they depend on and how they vary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.gathers import gathered
from fxfuse.patterns.norms import before_centring, is_centred, real, rows_of
from fxfuse.patterns.rotation import Entry
from fxfuse.patterns.value import Atom, Factor, Index, Kind, Leaf, Value, is_statistic
from fxfuse.slots import Slot

aten = torch.ops.aten
# Beside pointwise ops and views what may stand between an input and the rows taken of it.
JOINS = {aten._to_copy.default, aten.cat.default}


@dataclasses.dataclass(frozen=True)
class Parts:
    """A Value's factors by role, over its last dim made explicit. `centred` names the rows without
    their mean; the source is then what the mean was taken off, where one leaf holds that.
    """

    value: Value
    source: Leaf
    x: tuple[Factor, ...]
    tables: tuple[Factor | None, ...]
    weight: Factor | None
    statistic: Factor | None
    scale: Factor | None
    centred: Leaf | None


def split_bias(value: Value) -> tuple[Value, Value | None]:
    """What a norm adds to its rows, apart from them: the terms of weights alone beside terms with a
    statistic.
    """
    normed = [t for t in value.terms if any(is_statistic(f.leaf) for f in t.factors)]
    added = [t for t in value.terms if _is_of_weights({f.leaf for f in t.factors})]
    if not added or len(normed) + len(added) != len(value.terms):
        return value, None
    rows, bias = (dataclasses.replace(value, terms=tuple(terms)) for terms in (normed, added))
    return rows, bias


def _is_of_weights(leaves: set[Leaf]) -> bool:
    kinds = {x.kind for x in leaves if not _is_given(x) or x.kind is not Kind.DATA}
    return Kind.WEIGHT in kinds and Kind.DATA not in kinds


def common_of(value: Value) -> set[Leaf]:
    """The leaves in all products that have data in them, tables aside that came into the graph:
    those vary along fewer rows than what they turn.
    """
    held = [{f.leaf for f in t.factors} for t in value.terms]
    of_data = [leaves for leaves in held if any(x.kind is Kind.DATA for x in leaves)] or held
    common = set.intersection(*of_data)
    last = set(value.dims[-1]) if value.dims else set()
    rows: dict[Leaf, set[Atom]] = {x: set() for x in common if x.kind is Kind.DATA}
    for factor in (f for t in value.terms for f in t.factors if f.leaf in rows):
        rows[factor.leaf] |= {a for index in factor.axes for a, s in index.strides if s} - last
    tables = {x for x in rows if _is_given(x) and any(rows[x] < more for more in rows.values())}
    return common - tables


def sort(value: Value, kind: Kind = Kind.DATA) -> Parts:
    """Give each factor its role; the source is of that kind."""
    common = common_of(value)
    sources = [x for x in common if x.kind is kind and not is_statistic(x)]
    sources = [x for x in sources if _varies(value, x)] or sources
    if len(sources) != 1:
        raise Refused(f"{len(sources) or 'no'} data sources where one was expected")
    source = sources[0]
    x, tables, weights, statistics, scales = [], [], [], [], []
    for term in value.terms:
        rest = [f for f in term.factors if f.leaf is not source]
        own = [f for f in term.factors if f.leaf is source]
        if len(own) != 1:
            raise Refused("the source is multiplied by itself")
        x.append(own[0])
        table = [f for f in rest if is_table(f, common)]
        if len(table) > 1:
            raise Refused("more than one table in a product")
        tables.append(table[0] if table else None)
        rest = [f for f in rest if f not in table]
        weight = [f for f in rest if f.leaf.kind is Kind.WEIGHT and _varies(value, f.leaf)]
        statistic = [f for f in rest if is_statistic(f.leaf)]
        weights.append(_only(weight, "weight"))
        statistics.append(_only(statistic, "statistic"))
        scales.append(_only([f for f in rest if f not in weight + statistic], "factor by row"))
    _same_leaf(x, "source")
    uncentred = [y for f in x if (y := before_centring(f))] or x
    return Parts(
        value,
        uncentred[0].leaf,
        tuple(uncentred),
        tuple(tables),
        _same_leaf(weights, "weight"),
        _same(statistics, "statistic"),
        _same(scales, "factor by row"),
        source if is_centred(source) else None,
    )


def _varies(value: Value, leaf: Leaf) -> bool:
    """Whether a leaf is read at several channels."""
    read = [f for t in value.terms for f in t.factors if f.leaf is leaf and f.axes]
    return len({offset for f in read for offset in f.axes[-1].offsets}) > 1


def is_table(factor: Factor, common: set[Leaf], channels: tuple[Atom, ...] = ()) -> bool:
    """Whether a factor is a table: it differs between terms, or along the channels, which are
    explicit or `channels`.
    """
    if factor.leaf.kind is Kind.WEIGHT or is_statistic(factor.leaf) or not factor.axes:
        return False
    if factor.leaf not in common:
        return factor.leaf.kind is Kind.TABLE or _is_given(factor.leaf)
    return factor.leaf.kind is Kind.TABLE and any(
        len(set(index.offsets)) > 1 or any(index.stride(a) for a in channels)
        for index in factor.axes
    )


def _is_given(leaf: Leaf) -> bool:
    """Whether a leaf is an input of the graph, as tables are where an attention is a graph of its
    own, or rows that are taken by position of one, or of what is computed from inputs alone.
    """
    if not isinstance(leaf.slot, Slot):
        return False
    pending, taken = [leaf.slot], leaf.slot.call is None
    for slot in pending:
        call = slot.call
        if call is None:
            continue
        rows = gathered(call)
        if not rows and not _is_by_element(call.op):
            return False
        taken = taken or rows is not None
        pending += [x for x in (rows[:1] if rows else call.inputs()) if x not in pending]
    return taken


def _is_by_element(op: Any) -> bool:
    """Whether each element of a call's result is a function of one element of each operand."""
    pointwise = torch.Tag.pointwise in getattr(op, "tags", ())
    return pointwise or getattr(op, "is_view", False) or op in JOINS


def _only(factors: Sequence[Factor], role: str) -> Factor | None:
    if len(factors) > 1:
        raise Refused(f"more than one {role} in a product")
    return factors[0] if factors else None


def _same(factors: Sequence[Factor | None], role: str) -> Factor | None:
    first = factors[0]
    if any((f is None) != (first is None) or (f and first and f != first) for f in factors):
        raise Refused(f"terms that differ in their {role}")
    return first


def _same_leaf(factors: Sequence[Factor | None], role: str) -> Factor | None:
    """A leaf read at the same rows and heads; its channels differ by term, `_weight` checks them
    against the source's.
    """
    first = factors[0]
    if any((f and f.leaf) is not (first and first.leaf) for f in factors):
        raise Refused(f"terms that differ in their {role}")
    if any(f and first and rows_of(f) != rows_of(first) for f in factors):
        raise Refused(f"terms that read other rows of their {role}")
    return first


def entries_of(parts: Parts, start: int) -> list[list[Entry]]:
    """For each output channel, the products that make it up, in channels counted from `start`."""
    count = len(parts.value.terms[0].coefficients)
    result: list[list[Entry]] = [[] for _ in range(count)]
    for term, x, table in zip(parts.value.terms, parts.x, parts.tables, strict=True):
        walked = channel_axes(parts, table.leaf) if table else ()
        for i, c in enumerate(term.coefficients):
            if c:
                place = _place(table, walked, i) if table else 0
                channel = x.axes[-1].offsets[i] - start
                leaf = table.leaf if table else None
                result[i].append(Entry(real(c), channel, leaf, place))
    return result


def _place(table: Factor, channels: tuple[int, ...], i: int) -> int:
    """The table's channel, row-major over its channel axes; a complex table is read as its real
    view, real and imaginary parts in turn.
    """
    place = 0
    for j in channels:
        size = table.leaf.shape[j]
        if not isinstance(size, int):
            raise Refused("a table of unknown width")
        place = place * size + table.axes[j].offsets[i]
    return place if not table.leaf.part else 2 * place + (table.leaf.part == "im")


def channel_axes(parts: Parts, leaf: Leaf) -> tuple[int, ...]:
    """The axes of a table that the channels walk: its last, one in front of its rows, or the last
    three of a table of 2 x 2 matrices.
    """
    factors = [t for t in parts.tables if t is not None and t.leaf is leaf]
    axes = range(len(leaf.shape))
    walked = [j for j in axes if any(len(set(t.axes[j].offsets)) > 1 for t in factors)]
    if len(walked) == 1 and any(t.axes[j].strides for t in factors for j in axes[walked[0] :]):
        return tuple(walked)
    return tuple(axes[min(walked, default=len(axes) - 1) :])


def row_axes(parts: Parts, table: Factor) -> tuple[Index, ...]:
    """Where a table is read along the axes that the channels do not walk."""
    channels = channel_axes(parts, table.leaf)
    return tuple(index for j, index in enumerate(table.axes) if j not in channels)
