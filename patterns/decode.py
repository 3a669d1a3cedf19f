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
    rstd_access,
    table_access,
    weight_access,
    window,
)
from fxfuse.patterns.atoms import flatten_explicit
from fxfuse.patterns.norms import (
    Statistic,
    base_of,
    order_of,
    read_statistic,
    real,
    rows_of,
    without_offset,
)
from fxfuse.patterns.record import Norm, Stream
from fxfuse.patterns.roles import (
    Parts,
    channel_axes,
    common_of,
    entries_of,
    is_table,
    row_axes,
    sort,
    split_bias,
)
from fxfuse.patterns.rotation import Entry, pair_up, pass_through
from fxfuse.patterns.site import Access, Decoded
from fxfuse.patterns.value import Atom, Factor, Index, Kind, Leaf, Value, is_statistic
from fxfuse.slots import Scalar, Slot


def is_rotated(value: Value) -> bool:
    """Whether two terms or more multiply one data source by tables of their own; or the norm of
    such a sum.
    """
    value, _ = split_bias(value)
    if len(value.terms) < 2:
        return any(_is_norm_of_sum(f.leaf) for t in value.terms for f in t.factors)
    common = common_of(value)
    channels = value.dims[-1] if value.dims else ()
    tables = [any(is_table(f, common, channels) for f in t.factors) for t in value.terms]
    return sum(tables) >= 2 and any(x.kind is Kind.DATA for x in common)


def _is_norm_of_sum(leaf: Leaf) -> bool:
    definition = leaf.definition
    named = definition is not None and definition.op in ("sum", "centred")
    return named and definition is not None and is_rotated(definition.operands[0])


def decode(slot: Slot, value: Value) -> Decoded:
    """Decode the Value of a slot. Raises Refused."""
    if len(value.dims) < 2:
        raise Refused("the value has no rows")
    last = len(value.dims) - 1
    value = flatten_explicit(value, last)
    if value.explicit != value.dims[last]:
        raise Refused("another axis than the channels is irregular")
    rows, bias = split_bias(value)
    parts = sort(rows)
    stage = _after if _is_norm_of_sum(parts.source) else _before
    return dataclasses.replace(stage(slot, parts, bias), value=value)


def _before(slot: Slot, parts: Parts, bias: Value | None) -> Decoded:
    """Norm before the rotation, or no norm."""
    heads = _head_stride(parts.x[0])
    statistic = _over_head(parts, heads)
    channels = len(parts.value.terms[0].coefficients)
    starts = [
        min(o for o, c in zip(x.axes[-1].offsets, t.coefficients, strict=True) if c)
        for x, t in zip(parts.x, parts.value.terms, strict=True)
    ]
    start = min(starts)
    if statistic:
        if statistic.count != channels or statistic.start > start:
            raise Refused(f"a norm over {statistic.count} channels of {channels}")
        start = statistic.start
    entries = entries_of(parts, start)
    # A product by no table is a norm alone.
    rotates = len(parts.tables) > 1 or parts.tables[0] is not None
    rotation, passes, scale, cos, sin = (
        pair_up(entries, channels) if rotates else pass_through(entries)
    )
    rows, by_head = _rows(parts)
    atoms = [parts.value.dims[r] if r is not None else () for r in rows]
    if rotation is not None and by_head:
        rotation = dataclasses.replace(rotation, by_head=True)
    turned = atoms if by_head else atoms[:2]
    x = feature_access(parts.x[0], atoms, window(parts.source, heads, start, channels))
    given = parts.statistic if not statistic else None
    if given is not None and parts.scale is not None:
        raise Refused("a norm over the hidden width and a factor by row")
    row_factor = given or parts.scale
    weight, offset = _weight(parts, start, "before", atoms[2])
    added = _bias(parts, bias, entries, statistic, atoms[2]) if bias else None
    norm = None
    if parts.statistic is not None or parts.weight is not None:
        over: Literal["head", "given"] = "head" if statistic else "given"
        kind = statistic.kind if statistic else "rms"
        norm = Norm(over, "before", weight is not None, offset, kind, added is not None)
    stream = Stream(
        channels=channels,
        norm=norm,
        rotation=rotation,
        passes=passes,
        has_scale=row_factor is not None,
        scale=_times(scale, statistic.scale) if statistic else scale,
    )
    return Decoded(
        slot,
        parts.value,
        stream,
        rows,
        x,
        weight=weight,
        bias=added,
        scale=_row_factor(row_factor, atoms) if row_factor else None,
        cos=_table(parts, cos, turned) if cos else None,
        sin=_table(parts, sin, turned) if sin else None,
        eps=statistic.eps if statistic else 0.0,
    )


def _over_head(parts: Parts, heads: tuple[Atom, int] | None) -> Statistic | None:
    """The statistic of the very heads that are turned; None for one of other rows."""
    statistic = read_statistic(parts.statistic.leaf) if parts.statistic else None
    if (
        statistic is not None
        and parts.statistic is not None
        and statistic.base is parts.source
        and statistic.centred is parts.centred
        and statistic.stride == (heads[1] if heads else 0)
        and rows_of(base_of(parts.statistic, parts.source)) == rows_of(parts.x[0])
    ):
        return statistic
    if parts.centred is not None:
        raise Refused("rows without their mean that meet no norm of their own")
    return None


def _row_factor(factor: Factor, atoms: Sequence[tuple[Atom, ...]]) -> Access:
    """A factor by row: a tensor of the graph, or a statistic that is computed of one."""
    if factor.leaf.slot is not None or not is_statistic(factor.leaf):
        return rows_access(factor, atoms)
    statistic = read_statistic(factor.leaf)
    if statistic.kind != "rms" or isinstance(statistic.eps, Scalar):
        raise Refused("a row factor that no node of the graph holds")
    rows = base_of(factor, statistic.base)
    return rstd_access(rows, atoms, statistic.count, statistic.eps, statistic.scale)


def _times(a: float, b: float) -> float:
    """a * b, exactly 1 for a root and its rounded inverse."""
    return 1.0 if abs(a * b - 1) <= 1e-15 else a * b


def _after(slot: Slot, parts: Parts, bias: Value | None) -> Decoded:
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
    scale = real(value.terms[0].coefficients[0])
    straight = [[Entry(scale, i, None, 0)] for i in range(channels)]
    head = () if inner.rows[2] is None else value.dims[inner.rows[2]]
    weight, offset = _weight(parts, 0, "after", head)
    added = _bias(parts, bias, straight, statistic, head) if bias else None
    stream = dataclasses.replace(
        inner.stream,
        norm=Norm("head", "after", weight is not None, offset, statistic.kind, added is not None),
        scale=_times(scale, statistic.scale),
    )
    if inner.stream.scale != 1.0 or inner.stream.has_scale:
        raise Refused("a factor between rotation and norm")
    return dataclasses.replace(inner, stream=stream, weight=weight, bias=added, eps=statistic.eps)


def _head_stride(x: Factor) -> tuple[Atom, int] | None:
    """The head atom on the source's channel axis, and how far apart heads are."""
    strides = [(a, s) for a, s in x.axes[-1].strides if s]
    if len(strides) > 1:
        raise Refused("heads at irregular places of the projection")
    return strides[0] if strides else None


def _rows(parts: Parts) -> tuple[tuple[int | None, int | None, int | None], bool]:
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
    heads = heads or _unturned(value, dims, turning, rotates=any(parts.tables))
    rest = [d for d in dims if d not in heads]
    batch, token = (None, *rest) if len(rest) == 1 else rest if len(rest) == 2 else (None, None)
    return (batch, token, heads[0] if heads else None), bool(set(heads) & turning)


def _unturned(value: Value, dims: list[int], turning: set[int], *, rotates: bool) -> list[int]:
    """The dim of heads that are an axis of the source's own: no table turns by it, nor where there
    is one head by more than size tells.
    """
    if len(dims) == 2:
        # Tokens without a batch axis; one token is an axis of size 1.
        tokens_first = turning == {0} or (not value.dims[0] and not turning)
        if not rotates:
            return [d for d in [1, 0] if not value.dims[d]][:1]
        return [1] if tokens_first else []
    if len(dims) < 3:
        return []
    free = [d for d in [1, 2, 0] if d in dims and d not in turning]
    # Where nothing turns, no table tells heads from tokens: one head is an axis of size 1.
    likely = [d for d in free if not rotates and not value.dims[d]]
    if rotates and not turning & {1, 2}:
        # One token turns by no more than a batch row does: heads are the axis of another size.
        likely = [d for d in free if d and value.dims[d]]
    return [*likely, *free][:1]


def _table(parts: Parts, leaf: Leaf, atoms: Sequence[tuple[Atom, ...]]) -> Access:
    """A table's operand; every product that reads it must read the same row."""
    factors = [t for t in parts.tables if t is not None and t.leaf is leaf]
    if any(row_axes(parts, t) != row_axes(parts, factors[0]) for t in factors):
        raise Refused("a table that is read at several rows")
    return table_access(factors[0], atoms, channel_axes(parts, leaf))


def _weight(
    parts: Parts, start: int, when: str, head: Sequence[Atom]
) -> tuple[Access | None, float]:
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
    channels = len(parts.value.terms[0].coefficients)
    weight = dataclasses.replace(weights[0], leaf=leaf)
    return weight_access(weight, head, shift.pop(), channels), offset


def _bias(
    parts: Parts,
    bias: Value,
    entries: list[list[Entry]],
    statistic: Statistic | None,
    head: Sequence[Atom],
) -> Access:
    """The operand of what is added to a norm; it must go the way of the rows from there on."""
    other = sort(bias, Kind.WEIGHT)
    if statistic is None or statistic.scale != 1.0:
        raise Refused("a bias behind a norm that is no factor of the op")
    if other.weight or other.statistic or other.scale != parts.scale:
        raise Refused("a bias that meets other factors than its norm")
    first, second = (
        min(e.channel for row in found for e in row) for found in (entries, entries_of(other, 0))
    )
    start = second - first
    if [set(row) for row in entries_of(other, start)] != [set(row) for row in entries]:
        raise Refused("a bias that is turned otherwise than its norm")
    if _turning(parts) != _turning(other):
        raise Refused("a bias that is turned by other rows than its norm")
    return weight_access(other.x[0], head, start, len(entries))


def _turning(parts: Parts) -> set[tuple[Leaf, tuple[Index, ...]]]:
    """The tables, and at which rows they are read."""
    tables = [t for t in parts.tables if t is not None]
    return {(t.leaf, row_axes(parts, t)) for t in tables}
