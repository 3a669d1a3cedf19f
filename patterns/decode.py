"""Decode: a Value between projection and attention read backwards into a stream of an op's record,
or a Refusal.

The statement decoded is `y[i] = x[m(i)] * cos[a(i)] + sign(i) * x[p(i)] * sin[b(i)]` with optional
row statistic, weight and row scale. Roles come from what a factor depends on and how it varies,
never from names.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from fxfuse.patterns import shapes
from fxfuse.patterns.access import (
    Refused,
    feature_access,
    rows_access,
    table_access,
    weight_access,
    window,
)
from fxfuse.patterns.atoms import flatten_explicit
from fxfuse.patterns.norms import base_of, order_of, read_statistic, real, rows_of, without_offset
from fxfuse.patterns.record import Norm, Stream
from fxfuse.patterns.rotation import Entry, pair_up
from fxfuse.patterns.site import Access, Decoded
from fxfuse.patterns.value import Atom, Factor, Kind, Leaf, Value, is_statistic
from fxfuse.slots import Slot


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A Value's factors by role, over its last dim made explicit."""

    value: Value
    source: Leaf
    x: tuple[Factor, ...]
    tables: tuple[Factor | None, ...]
    weight: Factor | None
    statistic: Factor | None
    scale: Factor | None


def is_rotated(value: Value) -> bool:
    """Whether two terms or more multiply one data source by tables of their own; or the norm of
    such a sum.
    """
    if len(value.terms) < 2:
        return any(_is_norm_of_sum(f.leaf) for t in value.terms for f in t.factors)
    common = _common(value)
    channels = value.dims[-1] if value.dims else ()
    tables = [any(_is_table(f, common, channels) for f in t.factors) for t in value.terms]
    return sum(tables) >= 2 and any(x.kind is Kind.DATA for x in common)


def _common(value: Value) -> set[Leaf]:
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


def _is_norm_of_sum(leaf: Leaf) -> bool:
    definition = leaf.definition
    return definition is not None and definition.op == "sum" and is_rotated(definition.operands[0])


def decode(slot: Slot, value: Value) -> Decoded:
    """Decode the Value of a slot. Raises Refused."""
    if len(value.dims) < 2:
        raise Refused("the value has no rows")
    last = len(value.dims) - 1
    value = flatten_explicit(value, last)
    if value.explicit != value.dims[last]:
        raise Refused("another axis than the channels is irregular")
    parts = _sort(value)
    if _is_norm_of_sum(parts.source):
        return _after(slot, parts)
    return _before(slot, parts)


def _sort(value: Value) -> _Parts:
    """Give each factor its role."""
    common = _common(value)
    sources = [x for x in common if x.kind is Kind.DATA and not is_statistic(x)]
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
        table = [f for f in rest if _is_table(f, common)]
        if len(table) > 1:
            raise Refused("more than one table in a product")
        tables.append(table[0] if table else None)
        weights.append(_only([f for f in rest if f.leaf.kind is Kind.WEIGHT], "weight"))
        statistics.append(_only([f for f in rest if is_statistic(f.leaf)], "statistic"))
        scales.append(_only([f for f in rest if f not in table and _is_scale(f)], "factor by row"))
    _same_leaf(x, "source")
    return _Parts(
        value,
        source,
        tuple(x),
        tuple(tables),
        _same_leaf(weights, "weight"),
        _same(statistics, "statistic"),
        _same(scales, "factor by row"),
    )


def _varies(value: Value, leaf: Leaf) -> bool:
    return any(
        len(set(f.axes[-1].offsets)) > 1
        for t in value.terms
        for f in t.factors
        if f.leaf is leaf and f.axes
    )


def _is_table(factor: Factor, common: set[Leaf], channels: tuple[Atom, ...] = ()) -> bool:
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
    own.
    """
    return isinstance(leaf.slot, Slot) and leaf.slot.call is None


def _is_scale(factor: Factor) -> bool:
    return factor.leaf.kind is not Kind.WEIGHT and not is_statistic(factor.leaf)


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


def _before(slot: Slot, parts: _Parts) -> Decoded:
    """Norm before the rotation, or no norm."""
    statistic = read_statistic(parts.statistic.leaf) if parts.statistic else None
    heads = _head_stride(parts.x[0])
    over_head = (
        statistic is not None
        and parts.statistic is not None
        and statistic.base is parts.source
        and statistic.stride == (heads[1] if heads else 0)
        and rows_of(base_of(parts.statistic, parts.source)) == rows_of(parts.x[0])
    )
    channels = len(parts.value.terms[0].coefficients)
    starts = [
        min(o for o, c in zip(x.axes[-1].offsets, t.coefficients, strict=True) if c)
        for x, t in zip(parts.x, parts.value.terms, strict=True)
    ]
    start = min(starts)
    if over_head:
        assert statistic is not None
        if statistic.count != channels or statistic.start > start:
            raise Refused(f"a norm over {statistic.count} channels of {channels}")
        start = statistic.start
    rotation, passes, scale, cos, sin = pair_up(_entries(parts, start), channels)
    rows, by_head = _rows(parts)
    atoms = [parts.value.dims[r] if r is not None else () for r in rows]
    if rotation is not None and by_head:
        rotation = dataclasses.replace(rotation, by_head=True)
    turned = atoms if by_head else atoms[:2]
    x = feature_access(parts.x[0], atoms, window(parts.source, heads, start, channels))
    given = parts.statistic if not over_head else None
    if given is not None and parts.scale is not None:
        raise Refused("a norm over the hidden width and a factor by row")
    row_factor = given or parts.scale
    weight, offset = _weight(parts, start, "before")
    norm = None
    if parts.statistic is not None or parts.weight is not None:
        over: Literal["head", "given"] = "head" if over_head else "given"
        kind = statistic.kind if over_head and statistic else "rms"
        norm = Norm(over, "before", weight is not None, offset, kind)
    stream = Stream(
        channels=channels,
        norm=norm,
        rotation=rotation,
        passes=passes,
        has_scale=row_factor is not None,
        scale=scale,
    )
    return Decoded(
        slot,
        parts.value,
        stream,
        rows,
        x,
        weight=weight,
        scale=rows_access(row_factor, atoms) if row_factor else None,
        cos=_table(parts, cos, turned) if cos else None,
        sin=_table(parts, sin, turned) if sin else None,
        eps=statistic.eps if over_head and statistic else 0.0,
    )


def _after(slot: Slot, parts: _Parts) -> Decoded:
    """Norm after the rotation: the source is the name of a rotated sum."""
    definition = parts.source.definition
    assert definition is not None
    value = parts.value
    if len(value.terms) != 1 or parts.statistic is None or parts.scale is not None:
        raise Refused("a product of a rotated value that is not its norm")
    statistic = read_statistic(parts.statistic.leaf)
    whole = definition.operands[0]
    order = order_of(value, parts.x[0])
    inner = decode(slot, shapes.permute(whole, order))
    channels = inner.stream.channels
    if statistic.base is not parts.source or statistic.count != channels or statistic.start:
        raise Refused("a norm after the rotation over other channels than a head's")
    if rows_of(base_of(parts.statistic, parts.source)) != rows_of(parts.x[0]):
        raise Refused("a norm after the rotation by the statistic of other rows")
    if inner.stream.norm is not None:
        raise Refused("a norm before and after the rotation")
    if len(set(value.terms[0].coefficients)) > 1:
        raise Refused("a factor by channel that is no weight")
    weight, offset = _weight(parts, 0, "after")
    stream = dataclasses.replace(
        inner.stream,
        norm=Norm("head", "after", weight is not None, offset, statistic.kind),
        scale=real(value.terms[0].coefficients[0]),
    )
    if inner.stream.scale != 1.0 or inner.stream.has_scale:
        raise Refused("a factor between rotation and norm")
    return dataclasses.replace(inner, value=value, stream=stream, weight=weight, eps=statistic.eps)


def _entries(parts: _Parts, start: int) -> list[list[Entry]]:
    """For each output channel, the products that make it up, in channels counted from `start`."""
    count = len(parts.value.terms[0].coefficients)
    result: list[list[Entry]] = [[] for _ in range(count)]
    for term, x, table in zip(parts.value.terms, parts.x, parts.tables, strict=True):
        for i, c in enumerate(term.coefficients):
            if c:
                place = _place(parts, table, i) if table else 0
                channel = x.axes[-1].offsets[i] - start
                leaf = table.leaf if table else None
                result[i].append(Entry(real(c), channel, leaf, place))
    return result


def _place(parts: _Parts, table: Factor, i: int) -> int:
    """The table's channel, row-major over its channel axes; a complex table is read as its real
    view, real and imaginary parts in turn.
    """
    place, first = 0, len(table.axes) - _channel_axes(parts, table.leaf)
    for index, size in zip(table.axes[first:], table.leaf.shape[first:], strict=True):
        if not isinstance(size, int):
            raise Refused("a table of unknown width")
        place = place * size + index.offsets[i]
    return place if not table.leaf.part else 2 * place + (table.leaf.part == "im")


def _channel_axes(parts: _Parts, leaf: Leaf) -> int:
    """How many of a table's last axes the channels walk: one, or three of a table of 2 x 2
    matrices.
    """
    factors = [t for t in parts.tables if t is not None and t.leaf is leaf]
    axes = range(len(leaf.shape))
    walked = [j for j in axes if any(len(set(t.axes[j].offsets)) > 1 for t in factors)]
    return len(leaf.shape) - min(walked, default=len(leaf.shape) - 1)


def _head_stride(x: Factor) -> tuple[Atom, int] | None:
    """The head atom on the source's channel axis, and how far apart heads are."""
    strides = [(a, s) for a, s in x.axes[-1].strides if s]
    if len(strides) > 1:
        raise Refused("heads at irregular places of the projection")
    return strides[0] if strides else None


def _rows(parts: _Parts) -> tuple[tuple[int | None, int | None, int | None], bool]:
    """Which dims are batch, tokens and heads; and whether the tables differ by head."""
    value, last = parts.value, len(parts.value.dims) - 1
    head = _head_stride(parts.x[0])
    dims = [d for d in range(last)]
    while len(dims) > 3:
        empty = [d for d in dims if not value.dims[d]]
        if not empty:
            raise Refused("more than three row axes")
        dims.remove(empty[0])
    turning = {
        d
        for table in parts.tables
        if table
        for index in table.axes
        for a, s in index.strides
        if s
        for d in dims
        if a in value.dims[d]
    }
    heads = [d for d in dims if head and head[0] in value.dims[d]]
    if not heads and len(dims) == 3:
        heads = [d for d in [1, 2, 0] if d in dims and d not in turning][:1]
    rest = [d for d in dims if d not in heads]
    batch, token = (None, *rest) if len(rest) == 1 else rest if len(rest) == 2 else (None, None)
    return (batch, token, heads[0] if heads else None), bool(set(heads) & turning)


def _table(parts: _Parts, leaf: Leaf, atoms: Sequence[tuple[Atom, ...]]) -> Access:
    """A table's operand; every product that reads it must read the same row."""
    factors = [t for t in parts.tables if t is not None and t.leaf is leaf]
    channels = _channel_axes(parts, leaf)
    if any(t.axes[:-channels] != factors[0].axes[:-channels] for t in factors):
        raise Refused("a table that is read at several rows")
    return table_access(factors[0], atoms, channels)


def _weight(parts: _Parts, start: int, when: str) -> tuple[Access | None, float]:
    """The weight's operand and the number added to it. It must meet the channel it is written for:
    the source's before the rotation, the result's after it.
    """
    if parts.weight is None:
        return None, 0.0
    shift: set[int] = set()
    weights = [next(f for f in t.factors if f.leaf is parts.weight.leaf) for t in parts.value.terms]
    for term, x, weight in zip(parts.value.terms, parts.x, weights, strict=True):
        for i, c in enumerate(term.coefficients):
            if c:
                channel = x.axes[-1].offsets[i] - start if when == "before" else i
                shift.add(weight.axes[-1].offsets[i] - channel)
    if len(shift) != 1:
        raise Refused("a weight that meets other channels than the norm's")
    leaf, offset = without_offset(parts.weight.leaf)
    head = _head_stride(parts.x[0])
    channels = len(parts.value.terms[0].coefficients)
    weight = dataclasses.replace(weights[0], leaf=leaf)
    return weight_access(weight, [head[0]] if head else [], shift.pop(), channels), offset
