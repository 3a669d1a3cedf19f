"""Views, repeats and concatenation of Values: nothing is computed, index maps change."""

import dataclasses
from collections.abc import Iterable, Sequence

from fxfuse.patterns.arithmetic import add
from fxfuse.patterns.atoms import (
    count_of,
    divide,
    flatten_explicit,
    make_affine,
    rebuild,
    split_atom,
    spread,
    take,
    with_dim,
)
from fxfuse.patterns.value import Atom, Index, Opaque, Size, Term, Value


def permute(value: Value, order: Sequence[int]) -> Value:
    return dataclasses.replace(value, dims=tuple(value.dims[i] for i in order))


def unsqueeze(value: Value, dim: int) -> Value:
    return dataclasses.replace(value, dims=(*value.dims[:dim], (), *value.dims[dim:]))


def squeeze(value: Value, dims: Iterable[int]) -> Value:
    gone = {d for d in dims if not value.dims[d]}
    return dataclasses.replace(
        value, dims=tuple(d for i, d in enumerate(value.dims) if i not in gone)
    )


def expand(value: Value, shape: Sequence[Size]) -> Value:
    """Broadcast to `shape`: a grown axis is an atom that no factor reads."""
    missing = len(shape) - len(value.dims)
    dims = ((),) * missing + value.dims
    grown = tuple(
        (Atom(s),) if not dim and s != 1 else dim for dim, s in zip(dims, shape, strict=True)
    )
    return dataclasses.replace(value, dims=grown)


def repeat(value: Value, dim: int, times: Size, *, inner: bool) -> Value:
    """Tile (`repeat`) or repeat each element (`repeat_interleave`, inner=True) along dim."""
    if times == 1:
        return value
    old = value.dims[dim]
    new = (*old, Atom(times)) if inner else (Atom(times), *old)
    return dataclasses.replace(value, dims=with_dim(value.dims, dim, new))


def view(value: Value, shape: Sequence[Size]) -> Value:
    """Regroup the atoms, row-major, to `shape`; an atom is split where a size divides it."""
    if any(s == 0 for s in shape):
        raise Opaque("a tensor without elements")
    rest = [a for a in value.atoms if a.size != 1]
    dims: list[tuple[Atom, ...]] = []
    for size in shape:
        group: list[Atom] = []
        while size != 1:
            if not rest:
                raise Opaque("a view of another size")
            atom = rest.pop(0)
            if (left := divide(size, atom.size)) is not None:
                size = left
                group.append(atom)
            elif divide(atom.size, size) is not None:
                value, outer, inner = split_atom(value, atom, divide(atom.size, size))
                group.append(outer)
                rest.insert(0, inner)
                size = 1
            else:
                raise Opaque(f"a view that cuts {atom.size} by {size}")
        dims.append(tuple(group))
    if rest:
        raise Opaque("a view of another size")
    return dataclasses.replace(value, dims=tuple(dims))


def narrow(value: Value, dim: int, start: Size, step: int, length: Size) -> Value:
    """value[start : start + step * length : step] along dim."""
    atoms = value.dims[dim]
    if length == value.shape[dim] and step == 1:
        return value
    if length == 0:
        return Value(with_dim(value.dims, dim, (Atom(0),)), (), (), value.dtype)
    if not atoms:
        return value
    if len(atoms) > 1 or atoms[0] in value.explicit:
        return _narrow_explicit(flatten_explicit(value, dim), dim, start, step, length)
    if not isinstance(start, int):
        raise Opaque("a slice at a symbolic position")
    old, new = atoms[0], Atom(length)

    def change(index: Index) -> Index:
        stride = index.stride(old)
        if not stride:
            return index
        strides = tuple((new, s * step) if a is old else (a, s) for a, s in index.strides)
        if length == 1:
            strides = tuple((a, s) for a, s in strides if a is not new)
        return Index(tuple([o + stride * start for o in index.offsets]), strides)

    return rebuild(value, change, dims=with_dim(value.dims, dim, () if length == 1 else (new,)))


def _narrow_explicit(value: Value, dim: int, start: int, step: int, length: int) -> Value:
    old, new = value.dims[dim][0], Atom(length)
    others = tuple(a for a in value.explicit if a is not old)
    value = spread(value, (*others, old))
    rows = count_of(others)
    chosen = [start + step * i for i in range(length)]
    positions = [r * old.size + c for r in range(rows) for c in chosen]
    if length == 1:
        return dataclasses.replace(
            take(value, positions, others), dims=with_dim(value.dims, dim, ())
        )
    return dataclasses.replace(
        take(value, positions, (*others, new)), dims=with_dim(value.dims, dim, (new,))
    )


def concatenate(values: Sequence[Value], dim: int) -> Value:
    """Concatenate along dim: each operand padded with zeros to the full length, then added."""
    values = [flatten_explicit(v, dim) for v in values]
    total = sum(v.dims[dim][0].size for v in values)
    result: Value | None = None
    start = 0
    for v in values:
        padded = _pad(v, dim, start, total)
        result = padded if result is None else add(result, padded)
        start += v.dims[dim][0].size
    assert result is not None
    return make_affine(result, result.dims[dim][0]) if total > 1 else result


def scatter(value: Value, part: Value, dim: int, start: int, step: int) -> Value:
    """value with its elements start, start + step, ... along dim replaced by part's."""
    value, part = flatten_explicit(value, dim), flatten_explicit(part, dim)
    total, count = value.dims[dim][0].size, part.dims[dim][0].size
    atom = value.dims[dim][0]
    others = tuple(a for a in value.explicit if a is not atom)
    value = spread(value, (*others, atom))
    inside = {start + step * i for i in range(count)}
    mask = [i not in inside for _ in range(count_of(others)) for i in range(total)]
    return add(_masked(value, mask), _pad(part, dim, start, total, step))


def _pad(value: Value, dim: int, start: int, total: int, step: int = 1) -> Value:
    """Zeros along dim, but for value's elements at start, start + step, ..."""
    old, new = value.dims[dim][0], Atom(total)
    others = tuple(a for a in value.explicit if a is not old)
    value = spread(value, (*others, old))
    rows = count_of(others)
    places = [divmod(i - start, step) for i in range(total)]
    mask = [not rest and 0 <= i < old.size for _ in range(rows) for i, rest in places]
    inside = [r * old.size + min(max(i, 0), old.size - 1) for r in range(rows) for i, _ in places]
    value = _masked(take(value, inside, (*others, new)), mask)
    return dataclasses.replace(value, dims=with_dim(value.dims, dim, (new,)))


def _masked(value: Value, mask: Sequence[bool]) -> Value:
    """Zeros where the mask over the explicit positions is false."""
    terms = tuple(
        Term(tuple([c if m else 0.0 for c, m in zip(t.coefficients, mask, strict=True)]), t.factors)
        for t in value.terms
    )
    return dataclasses.replace(value, terms=terms)
