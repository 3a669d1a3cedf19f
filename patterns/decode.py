"""Decode: a Value between projection and attention read backwards into a stream of an op's record,
or a Refusal.

The statement decoded is `y[i] = x[m(i)] * cos[a(i)] + sign(i) * x[p(i)] * sin[b(i)]` with optional
row statistic, weight and row scale. Roles come from what a factor depends on and how it varies,
never from names.
"""

import dataclasses
from collections.abc import Sequence

from fxfuse.patterns import value as v
from fxfuse.patterns.access import (
    Refused,
    feature_access,
    rows_access,
    table_access,
    weight_access,
    window,
)
from fxfuse.patterns.record import Norm, Pair, Pass, Rotation, Stream
from fxfuse.patterns.site import Access, Decoded
from fxfuse.patterns.value import Atom, Factor, Index, Kind, Leaf, Term, Value
from fxfuse.slots import Scalar, Slot


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One product that makes up an output channel."""

    coefficient: float
    channel: int
    table: Leaf | None
    place: int


@dataclasses.dataclass(frozen=True)
class _Statistic:
    """rsqrt(mean of squares + eps): over `count` channels of `base`, from `start`, heads `stride`
    apart.
    """

    base: Leaf
    count: int
    start: int
    stride: int
    eps: float | Scalar


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
    common = set.intersection(*({f.leaf for f in t.factors} for t in value.terms))
    tables = [any(_is_table(f, common) for f in t.factors) for t in value.terms]
    return sum(tables) >= 2 and any(x.kind is Kind.DATA for x in common)


def _is_norm_of_sum(leaf: Leaf) -> bool:
    definition = leaf.definition
    return definition is not None and definition.op == "sum" and is_rotated(definition.operands[0])


def decode(slot: Slot, value: Value) -> Decoded:
    """Decode the Value of a slot. Raises Refused."""
    if len(value.dims) < 2:
        raise Refused("the value has no rows")
    last = len(value.dims) - 1
    value = v.flatten_explicit(value, last)
    if value.explicit != value.dims[last]:
        raise Refused("another axis than the channels is irregular")
    parts = _sort(value)
    if _is_norm_of_sum(parts.source):
        return _after(slot, parts)
    return _before(slot, parts)


def _sort(value: Value) -> _Parts:
    """Give each factor its role."""
    common = set.intersection(*({f.leaf for f in t.factors} for t in value.terms))
    sources = [x for x in common if x.kind is Kind.DATA and not v.is_statistic(x)]
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
        statistics.append(_only([f for f in rest if v.is_statistic(f.leaf)], "statistic"))
        scales.append(_only([f for f in rest if f not in table and _is_scale(f)], "factor by row"))
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


def _is_table(factor: Factor, common: set[Leaf]) -> bool:
    if factor.leaf.kind is Kind.WEIGHT or v.is_statistic(factor.leaf) or not factor.axes:
        return False
    if factor.leaf not in common:
        return True
    return factor.leaf.kind is Kind.TABLE and len(set(factor.axes[-1].offsets)) > 1


def _is_scale(factor: Factor) -> bool:
    return factor.leaf.kind is not Kind.WEIGHT and not v.is_statistic(factor.leaf)


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
    """The weight; its index differs by term, and `_weight` checks it against the source's."""
    if any((f and f.leaf) is not (factors[0] and factors[0].leaf) for f in factors):
        raise Refused(f"terms that differ in their {role}")
    return factors[0]


def _before(slot: Slot, parts: _Parts) -> Decoded:
    """Norm before the rotation, or no norm."""
    statistic = _statistic(parts.statistic.leaf) if parts.statistic else None
    heads = _head_stride(parts.x[0])
    over_head = (
        statistic is not None
        and statistic.base is parts.source
        and statistic.stride == (heads[1] if heads else 0)
        and _walked(parts.statistic) == _walked(parts.x[0])
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
    rotation, passes, scale, cos, sin = _rotation(_entries(parts, start), channels)
    rows = _rows(parts)
    atoms = [parts.value.dims[r] if r is not None else () for r in rows]
    x = feature_access(parts.x[0], atoms, window(parts.source, heads, start, channels))
    given = parts.statistic if not over_head else None
    if given is not None and parts.scale is not None:
        raise Refused("a norm over the hidden width and a factor by row")
    row_factor = given or parts.scale
    weight, offset = _weight(parts, start, "before")
    norm = None
    if parts.statistic is not None or parts.weight is not None:
        norm = Norm("head" if over_head else "given", "before", weight is not None, offset)
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
        cos=_table(parts, cos, atoms) if cos else None,
        sin=_table(parts, sin, atoms) if sin else None,
        eps=statistic.eps if over_head and statistic else 0.0,
    )


def _walked(factor: Factor | None) -> set[Atom]:
    """The atoms that a factor varies along, the channels aside."""
    axes = factor.axes if factor else ()
    return {a for index in axes for a, stride in index.strides if stride}


def _after(slot: Slot, parts: _Parts) -> Decoded:
    """Norm after the rotation: the source is the name of a rotated sum."""
    definition = parts.source.definition
    assert definition is not None
    value = parts.value
    if len(value.terms) != 1 or parts.statistic is None or parts.scale is not None:
        raise Refused("a product of a rotated value that is not its norm")
    statistic = _statistic(parts.statistic.leaf)
    whole = definition.operands[0]
    order = _order(value, parts.x[0])
    inner = decode(slot, v.permute(whole, order))
    channels = inner.stream.channels
    if statistic.base is not parts.source or statistic.count != channels or statistic.start:
        raise Refused("a norm after the rotation over other channels than a head's")
    if inner.stream.norm is not None:
        raise Refused("a norm before and after the rotation")
    if len(set(value.terms[0].coefficients)) > 1:
        raise Refused("a factor by channel that is no weight")
    weight, offset = _weight(parts, 0, "after")
    stream = dataclasses.replace(
        inner.stream,
        norm=Norm("head", "after", weight is not None, offset),
        scale=_real(value.terms[0].coefficients[0]),
    )
    if inner.stream.scale != 1.0 or inner.stream.has_scale:
        raise Refused("a factor between rotation and norm")
    return dataclasses.replace(inner, value=value, stream=stream, weight=weight, eps=statistic.eps)


def _order(value: Value, z: Factor) -> list[int]:
    """The order of z's axes that gives value's dims; z is read whole."""
    order = []
    for dim in value.dims:
        axes = [
            j
            for j, index in enumerate(z.axes)
            if dim and ([a for a, _ in index.strides] == list(dim) or _is_whole(index, dim, value))
        ]
        order.append(axes[0] if axes else -1)
    rest = [j for j in range(len(z.axes)) if j not in order]
    order = [rest.pop(0) if j < 0 and rest else j for j in order]
    if sorted(order) != list(range(len(z.axes))):
        raise Refused("a rotated value that is regrouped before its norm")
    return order


def _is_whole(index: Index, dim: tuple[Atom, ...], value: Value) -> bool:
    explicit = value.explicit == dim
    return explicit and not index.strides and index.offsets == tuple(range(dim[0].size))


def _statistic(leaf: Leaf) -> _Statistic:
    """Read rsqrt(mean(x * x) + eps) backwards from its leaf."""
    inner = _under_root(leaf)
    means = [t for t in inner.terms if t.factors and _op(t.factors[0].leaf) == "mean"]
    rest = [t for t in inner.terms if t not in means]
    if len(means) != 1 or len(means[0].factors) != 1 or set(means[0].coefficients) != {1.0}:
        raise Refused("a root of something else than a mean of squares")
    eps = _eps(rest)
    definition = means[0].factors[0].leaf.definition
    assert definition is not None
    square, (dims, _) = definition.operands[0], definition.params
    if len(square.terms) != 1 or set(square.terms[0].coefficients) != {1.0}:
        raise Refused("a mean of something else than squares")
    factors = square.terms[0].factors
    if len(factors) != 2 or factors[0] != factors[1]:
        raise Refused("a mean of something else than squares")
    base, index = factors[0].leaf, factors[0].axes[-1]
    reduced = [a for d in dims for a in square.dims[d]]
    if len(reduced) != 1 or index.stride(reduced[0]) != 1 or len(set(index.offsets)) != 1:
        raise Refused("a mean over other elements than a row's channels")
    kept = [s for a, s in index.strides if a is not reduced[0]]
    return _Statistic(
        base, reduced[0].size, index.offsets[0], kept[0] if len(kept) == 1 else 0, eps
    )


def _op(leaf: Leaf) -> str:
    return leaf.definition.op if leaf.definition else ""


def _under_root(leaf: Leaf) -> Value:
    definition = leaf.definition
    if definition is not None and definition.op == "reciprocal":
        operand = definition.operands[0]
        leaves = operand.leaves()
        if len(operand.terms) == 1 and len(leaves) == 1 and _op(leaves[0]) == "sqrt":
            definition = leaves[0].definition
    if definition is None or definition.op not in ("rsqrt", "sqrt"):
        raise Refused(f"a row factor that is no rsqrt but {_op(leaf) or 'unknown'}")
    return definition.operands[0]


def _eps(terms: Sequence[Term]) -> float | Scalar:
    if not terms:
        return 0.0
    if len(terms) > 1 or len(terms[0].factors) > 1 or len(set(terms[0].coefficients)) > 1:
        raise Refused("an eps that is no scalar")
    term = terms[0]
    if not term.factors:
        return _real(term.coefficients[0])
    slot = term.factors[0].leaf.slot
    if not isinstance(slot, Scalar) or term.coefficients[0] != 1:
        raise Refused("an eps that is no scalar")
    return slot


def _real(number: complex) -> float:
    if isinstance(number, complex) and number.imag:
        raise Refused("a complex factor")
    return float(number.real)


def _entries(parts: _Parts, start: int) -> list[list[_Entry]]:
    """For each output channel, the products that make it up, in channels counted from `start`."""
    count = len(parts.value.terms[0].coefficients)
    result: list[list[_Entry]] = [[] for _ in range(count)]
    for term, x, table in zip(parts.value.terms, parts.x, parts.tables, strict=True):
        for i, c in enumerate(term.coefficients):
            if c:
                place = _place(table, i) if table else 0
                channel = x.axes[-1].offsets[i] - start
                leaf = table.leaf if table else None
                result[i].append(_Entry(_real(c), channel, leaf, place))
    return result


def _place(table: Factor, i: int) -> int:
    """The table's channel; a complex table is read as its real view, real and imaginary parts in
    turn.
    """
    offset = table.axes[-1].offsets[i]
    return offset if not table.leaf.part else 2 * offset + (table.leaf.part == "im")


def _rotation(
    entries: list[list[_Entry]], channels: int
) -> tuple[Rotation | None, tuple[Pass, ...], float, Leaf | None, Leaf | None]:
    """Pair the channels; returns the rotation, the passes, the common factor, and the two
    tables.
    """
    sizes = {abs(e.coefficient) for row in entries for e in row}
    if len(sizes) != 1:
        raise Refused(f"channels of different scale: {sorted(sizes)}")
    scale = sizes.pop()
    plain = [i for i, row in enumerate(entries) if len(row) == 1 and row[0].table is None]
    turned: dict[frozenset[int], list[int]] = {}
    for i, row in enumerate(entries):
        if i in plain:
            continue
        if len(row) != 2 or any(e.table is None for e in row):
            raise Refused(f"channel {i} is no rotation of two channels")
        turned.setdefault(frozenset(e.channel for e in row), []).append(i)
    if not turned:
        raise Refused("no channel is rotated")
    pairs = [_pair(entries, outputs) for outputs in turned.values()]
    pairs.sort(key=lambda p: p.y[0])
    first = pairs[0]
    if any(p.tables != first.tables or p.signs != first.signs for p in pairs):
        raise Refused("pairs that differ in their tables or in the sign of their turn")
    negative = [i for i in plain if entries[i][0].coefficient < 0]
    if negative:
        raise Refused(f"channel {negative[0]} changes its sign")
    rotation = Rotation(
        pairs=len(pairs),
        x=_fit([p.x for p in pairs], "source channels"),
        y=_fit([p.y for p in pairs], "result channels"),
        cos=_fit([p.cos for p in pairs], "cos channels"),
        sin=_fit([p.sin for p in pairs], "sin channels"),
        signs=first.signs,
    )
    return rotation, _passes(entries, plain), scale, *first.tables


@dataclasses.dataclass(frozen=True)
class _Turn:
    x: tuple[int, int]
    y: tuple[int, int]
    cos: tuple[int, int]
    sin: tuple[int, int]
    signs: tuple[int, int]
    tables: tuple[Leaf, Leaf]


def _pair(entries: list[list[_Entry]], outputs: list[int]) -> _Turn:
    """Two outputs over the same two channels: which products are cos, which sin."""
    if len(outputs) != 2:
        raise Refused(f"channel {outputs[0]} has no partner")
    i, j = outputs
    for a, b in ((0, 1), (1, 0)):
        c0, s0 = entries[i][a], entries[i][b]
        if c0.channel == s0.channel:
            raise Refused(f"channel {i} is turned with itself")
        c1 = next(e for e in entries[j] if e.channel == s0.channel)
        s1 = next(e for e in entries[j] if e.channel == c0.channel)
        positive = c0.coefficient > 0 and c1.coefficient > 0
        opposite = s0.coefficient * s1.coefficient < 0
        if positive and opposite and _same_table(c0, c1) and _same_table(s0, s1):
            assert c0.table is not None and s0.table is not None
            sign = 1 if s0.coefficient > 0 else -1
            return _Turn(
                (c0.channel, s0.channel),
                (i, j),
                (c0.place, c1.place),
                (s0.place, s1.place),
                (sign, -sign),
                (c0.table, s0.table),
            )
    raise Refused(f"channels {i} and {j} are no rotation: their signs or tables do not fit")


def _same_table(a: _Entry, b: _Entry) -> bool:
    """One table, or the two parts of one complex table where only the place tells them apart."""
    return a.table is b.table


def _fit(places: list[tuple[int, int]], what: str) -> Pair:
    (first, second), step = places[0], places[1][0] - places[0][0] if len(places) > 1 else 1
    if any(p != (first + step * k, second + step * k) for k, p in enumerate(places)):
        raise Refused(f"{what} at irregular places")
    return Pair(first, second, step)


def _passes(entries: list[list[_Entry]], plain: list[int]) -> tuple[Pass, ...]:
    runs: list[Pass] = []
    for i in plain:
        channel = entries[i][0].channel
        last = runs[-1] if runs else None
        if last and (i, channel) == (last.y_start + last.length, last.x_start + last.length):
            runs[-1] = dataclasses.replace(last, length=last.length + 1)
        else:
            runs.append(Pass(channel, i, 1))
    if len(runs) > 4:
        raise Refused("unrotated channels in too many pieces")
    return tuple(runs)


def _head_stride(x: Factor) -> tuple[Atom, int] | None:
    """The head atom on the source's channel axis, and how far apart heads are."""
    strides = [(a, s) for a, s in x.axes[-1].strides if s]
    if len(strides) > 1:
        raise Refused("heads at irregular places of the projection")
    return strides[0] if strides else None


def _rows(parts: _Parts) -> tuple[int | None, int | None, int | None]:
    """Which dims are batch, tokens and heads."""
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
    if set(heads) & turning:
        raise Refused("tables that differ by head")
    rest = [d for d in dims if d not in heads]
    batch, token = (None, *rest) if len(rest) == 1 else rest if len(rest) == 2 else (None, None)
    return batch, token, heads[0] if heads else None


def _table(parts: _Parts, leaf: Leaf, atoms: Sequence[tuple[Atom, ...]]) -> Access:
    """A table's operand; every product that reads it must read the same row."""
    factors = [t for t in parts.tables if t is not None and t.leaf is leaf]
    if any(t.axes[:-1] != factors[0].axes[:-1] for t in factors):
        raise Refused("a table that is read at several rows")
    return table_access(factors[0], atoms)


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
    leaf, offset = _without_offset(parts.weight.leaf)
    head = _head_stride(parts.x[0])
    channels = len(parts.value.terms[0].coefficients)
    weight = dataclasses.replace(weights[0], leaf=leaf)
    return weight_access(weight, [head[0]] if head else [], shift.pop(), channels), offset


def _without_offset(leaf: Leaf) -> tuple[Leaf, float]:
    """The raw weight and the number a float32 sum adds to it."""
    if _op(leaf) != "offset" or leaf.definition is None:
        return leaf, 0.0
    inner, (number,) = leaf.definition.operands[0], leaf.definition.params
    term = inner.terms[0]
    whole = len(inner.terms) == 1 and len(term.factors) == 1 and set(term.coefficients) == {1.0}
    if whole and inner.shape == term.factors[0].leaf.shape:
        return term.factors[0].leaf, float(number)
    return leaf, 0.0
