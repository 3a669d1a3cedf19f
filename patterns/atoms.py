"""Atoms of a Value made explicit, renamed, split: what shapes and arithmetic stand on."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from fxfuse.patterns.value import (
    MAX_EXPLICIT,
    Atom,
    Factor,
    Index,
    Opaque,
    Size,
    Term,
    Value,
    product,
)

Atoms: TypeAlias = tuple[Atom, ...]


def count_of(atoms: Sequence[Atom]) -> int:
    count = product(a.size for a in atoms)
    if not isinstance(count, int) or not 0 < count <= MAX_EXPLICIT:
        raise Opaque(f"an irregular axis of {count} elements")
    return count


def _positions(old: Sequence[Atom], new: Sequence[Atom]) -> list[int]:
    """For each row-major position over `new`, the position over `old` (whose atoms are all among
    `new`).
    """
    steps = {}
    step = 1
    for atom in reversed(old):
        steps[atom] = step
        step *= atom.size
    ranges = [[i * steps.get(a, 0) for i in range(a.size)] for a in new]
    return [sum(parts) for parts in itertools.product(*ranges)]


def rebuild(value: Value, change: Callable[[Index], Index], **fields: Any) -> Value:
    terms = tuple(
        Term(t.coefficients, tuple(Factor(f.leaf, tuple(map(change, f.axes))) for f in t.factors))
        for t in value.terms
    )
    return dataclasses.replace(value, terms=terms, **fields)


def take(value: Value, positions: Sequence[int], explicit: tuple[Atom, ...]) -> Value:
    """Re-read every explicit tuple at `positions`; the result is explicit over `explicit`. Terms
    that are zero there are dropped.
    """
    terms = tuple(
        Term(
            tuple([t.coefficients[p] for p in positions]),
            tuple(
                Factor(
                    f.leaf,
                    tuple(
                        Index(tuple([i.offsets[p] for p in positions]), i.strides) for i in f.axes
                    ),
                )
                for f in t.factors
            ),
        )
        for t in value.terms
        if any(t.coefficients[p] for p in positions)
    )
    return dataclasses.replace(value, terms=terms, explicit=explicit)


def spread(value: Value, explicit: tuple[Atom, ...]) -> Value:
    """The same value with its tuples over `explicit`, a superset of today's explicit atoms."""
    if explicit == value.explicit:
        return value
    count_of(explicit)
    return take(value, _positions(value.explicit, explicit), explicit)


def explode(value: Value, atom: Atom) -> Value:
    """Make an affine atom explicit."""
    if atom in value.explicit:
        return value
    explicit = (*value.explicit, atom)
    count = count_of(explicit)
    value = spread(value, explicit)
    coordinates = list(range(atom.size)) * (count // atom.size)

    def change(index: Index) -> Index:
        stride = index.stride(atom)
        if not stride:
            return index
        offsets = tuple([o + stride * c for o, c in zip(index.offsets, coordinates, strict=True)])
        return Index(offsets, tuple((a, s) for a, s in index.strides if a is not atom))

    return rebuild(value, change)


def make_affine(value: Value, atom: Atom) -> Value:
    """An explicit atom as an affine one, where every index moves along it in even steps and no
    coefficient changes; else the value as it is.
    """
    others, size = tuple(a for a in value.explicit if a is not atom), atom.size
    ordered = spread(value, (*others, atom))
    starts = range(0, count_of(ordered.explicit), size)

    def is_even(numbers: Sequence[complex], step: complex) -> bool:
        return all(numbers[s + i] == numbers[s] + step * i for s in starts for i in range(size))

    terms = []
    for term in ordered.terms:
        offsets = [i.offsets for f in term.factors for i in f.axes]
        if not is_even(term.coefficients, 0) or not all(is_even(o, o[1] - o[0]) for o in offsets):
            return value
        terms.append(Term(term.coefficients[::size], term.factors))

    def change(index: Index) -> Index:
        step = index.offsets[1] - index.offsets[0]
        return Index(index.offsets[::size], (*index.strides, *([(atom, step)] if step else [])))

    return rebuild(dataclasses.replace(ordered, terms=tuple(terms), explicit=others), change)


def flatten_explicit(value: Value, dim: int) -> Value:
    """Make dim one explicit atom."""
    atoms = value.dims[dim]
    if len(atoms) == 1 and atoms[0] in value.explicit:
        return value
    if not atoms:
        atom = Atom(1)
        value = dataclasses.replace(value, dims=with_dim(value.dims, dim, (atom,)))
        return spread(value, (*value.explicit, atom))
    for atom in atoms:
        value = explode(value, atom)
    others = tuple(a for a in value.explicit if a not in atoms)
    value = spread(value, (*others, *atoms))
    merged = Atom(count_of(atoms))
    return dataclasses.replace(
        value, explicit=(*others, merged), dims=with_dim(value.dims, dim, (merged,))
    )


def with_dim(dims: tuple[tuple[Atom, ...], ...], i: int, dim: tuple[Atom, ...]) -> Any:
    return (*dims[:i], dim, *dims[i + 1 :])


def rename(value: Value, names: dict[Atom, tuple[tuple[Atom, int], ...]]) -> Value:
    """Replace atoms by products of atoms: `atom -> ((outer, stride), (inner, 1))`."""

    def change(index: Index) -> Index:
        if not any(a in names for a, _ in index.strides):
            return index
        strides = tuple(
            (new, s * step) for a, s in index.strides for new, step in names.get(a, ((a, 1),))
        )
        return Index(index.offsets, strides)

    def each(atoms: tuple[Atom, ...]) -> tuple[Atom, ...]:
        return tuple(new for a in atoms for new, _ in names.get(a, ((a, 1),)))

    return rebuild(value, change, dims=tuple(map(each, value.dims)), explicit=each(value.explicit))


def divide(size: Size, by: Size) -> Size | None:
    """size / by if that is whole for certain, else None."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    import sympy

    quotient = sympy.sympify(size) / by
    if quotient.is_Integer:
        return int(quotient)
    return quotient if quotient.as_numer_denom()[1] == 1 else None


def walking(index: Index, size: Size) -> Atoms | None:
    """The atoms that walk an axis from its first to its last element, in order."""
    reached: Size = 1
    for atom, stride in reversed(index.strides):
        if stride != reached:
            return None
        reached = reached * atom.size
    is_whole = not any(index.offsets) and divide(size, reached) == 1
    return tuple(a for a, _ in index.strides) if is_whole else None


def split_atom(value: Value, atom: Atom, inner: Size) -> tuple[Value, Atom, Atom]:
    a, b = Atom(divide(atom.size, inner)), Atom(inner)
    return rename(value, {atom: ((a, inner), (b, 1))}), a, b
