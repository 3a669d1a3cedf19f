"""The value domain: what a tensor holds, as a sum of products of leaf tensors read through affine
index maps.

A `Value` is `sum over terms of coefficient * product of factors`. Its dims are products of atoms
(sizes with an identity, so a view is bookkeeping), a factor is a leaf tensor with one `Index` for
each leaf axis: an offset plus a stride for each atom. Most atoms stay affine. Where a cat, stack or
flip makes an index irregular, its atom becomes explicit: offsets and coefficients are then tuples
over the explicit atoms, row-major in `Value.explicit` order.

What the domain cannot hold raises `Opaque`; the reader then makes the result a fresh leaf.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = Any  # an int, or a sympy expression under dynamic shapes

MAX_TERMS, MAX_FACTORS, MAX_EXPLICIT = 12, 8, 65536


class Opaque(Exception):
    """The result cannot be held by the domain; the text says why, for refusals."""


class Atom:
    """An axis, or a part of one, with an identity of its own."""

    __slots__ = ("size",)

    def __init__(self, size: Size) -> None:
        self.size = size

    def __repr__(self) -> str:
        return f"{self.size}"


class Kind(Enum):
    """What a leaf depends on: parameters alone, positions and constants alone, or the user's
    data.
    """

    WEIGHT = "weight"
    TABLE = "table"
    DATA = "data"


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """How a leaf was computed, for decoding backwards: the op's short name, its operands and its
    parameters.
    """

    op: str
    operands: tuple["Value", ...]
    params: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor that is read as it is. `slot` is the lens slot that holds it (None: no node of the
    graph does), `version` its storage's version when it was read, `part` "re" or "im" of a complex
    tensor.
    """

    number: int
    shape: tuple[Size, ...]
    dtype: torch.dtype
    kind: Kind
    slot: Any = None
    version: int = 0
    part: str = ""
    definition: Definition | None = None

    def __repr__(self) -> str:
        name = self.definition.op if self.definition else self.kind.value
        return f"{name}{self.number}{'.' + self.part if self.part else ''}"


@dataclasses.dataclass(frozen=True)
class Index:
    """Position on one leaf axis: offsets[explicit position] + sum of stride * atom."""

    offsets: tuple[int, ...]
    strides: tuple[tuple[Atom, int], ...] = ()

    def stride(self, atom: Atom) -> int:
        return next((s for a, s in self.strides if a is atom), 0)


@dataclasses.dataclass(frozen=True)
class Factor:
    leaf: Leaf
    axes: tuple[Index, ...]


@dataclasses.dataclass(frozen=True)
class Term:
    coefficients: tuple[complex, ...]
    factors: tuple[Factor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    dims: tuple[tuple[Atom, ...], ...]
    explicit: tuple[Atom, ...]
    terms: tuple[Term, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(product(a.size for a in dim) for dim in self.dims)

    @property
    def atoms(self) -> tuple[Atom, ...]:
        return tuple(a for dim in self.dims for a in dim)

    def leaves(self) -> list[Leaf]:
        return list(dict.fromkeys(f.leaf for t in self.terms for f in t.factors))

    def sources(self) -> set[Leaf]:
        """The data leaves that are no statistic of another value."""
        return {x for x in self.leaves() if x.kind is Kind.DATA and not is_statistic(x)}

    def __repr__(self) -> str:
        return " + ".join("·".join(map(repr, (f.leaf for f in t.factors))) for t in self.terms)


STATISTICS = frozenset({"mean", "rsqrt", "sqrt", "reciprocal", "norm", "clamp_min"})


def is_statistic(leaf: Leaf) -> bool:
    return leaf.definition is not None and leaf.definition.op in STATISTICS


def product(sizes: Iterable[Size]) -> Size:
    return math.prod(sizes)


def leaf_value(leaf: Leaf) -> Value:
    dims = tuple(() if s == 1 else (Atom(s),) for s in leaf.shape)
    axes = tuple(Index((0,), tuple((a, 1) for a in dim)) for dim in dims)
    return Value(dims, (), (Term((1.0,), (Factor(leaf, axes),)),), leaf.dtype)


def constant(number: complex, dtype: torch.dtype) -> Value:
    return Value((), (), (Term((number,), ()),), dtype)


def _count(atoms: Sequence[Atom]) -> int:
    count = product(a.size for a in atoms)
    if not isinstance(count, int) or count > MAX_EXPLICIT:
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


def _rebuild(value: Value, change: Callable[[Index], Index], **fields: Any) -> Value:
    terms = tuple(
        Term(t.coefficients, tuple(Factor(f.leaf, tuple(map(change, f.axes))) for f in t.factors))
        for t in value.terms
    )
    return dataclasses.replace(value, terms=terms, **fields)


def _take(value: Value, positions: Sequence[int], explicit: tuple[Atom, ...]) -> Value:
    """Re-read every explicit tuple at `positions`; the result is explicit over `explicit`."""
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
    )
    return dataclasses.replace(value, terms=terms, explicit=explicit)


def spread(value: Value, explicit: tuple[Atom, ...]) -> Value:
    """The same value with its tuples over `explicit`, a superset of today's explicit atoms."""
    if explicit == value.explicit:
        return value
    _count(explicit)
    return _take(value, _positions(value.explicit, explicit), explicit)


def explode(value: Value, atom: Atom) -> Value:
    """Make an affine atom explicit."""
    if atom in value.explicit:
        return value
    explicit = (*value.explicit, atom)
    count = _count(explicit)
    value = spread(value, explicit)
    coordinates = list(range(atom.size)) * (count // atom.size)

    def change(index: Index) -> Index:
        stride = index.stride(atom)
        if not stride:
            return index
        offsets = tuple([o + stride * c for o, c in zip(index.offsets, coordinates, strict=True)])
        return Index(offsets, tuple((a, s) for a, s in index.strides if a is not atom))

    return _rebuild(value, change)


def flatten_explicit(value: Value, dim: int) -> Value:
    """Make dim one explicit atom."""
    atoms = value.dims[dim]
    if len(atoms) == 1 and atoms[0] in value.explicit:
        return value
    if not atoms:
        atom = Atom(1)
        value = dataclasses.replace(value, dims=_with(value.dims, dim, (atom,)))
        return spread(value, (*value.explicit, atom))
    for atom in atoms:
        value = explode(value, atom)
    others = tuple(a for a in value.explicit if a not in atoms)
    value = spread(value, (*others, *atoms))
    merged = Atom(_count(atoms))
    return dataclasses.replace(
        value, explicit=(*others, merged), dims=_with(value.dims, dim, (merged,))
    )


def _with(dims: tuple[tuple[Atom, ...], ...], i: int, dim: tuple[Atom, ...]) -> Any:
    return (*dims[:i], dim, *dims[i + 1 :])


def _rename(value: Value, names: dict[Atom, tuple[tuple[Atom, int], ...]]) -> Value:
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

    return _rebuild(value, change, dims=tuple(map(each, value.dims)), explicit=each(value.explicit))


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
    return dataclasses.replace(value, dims=_with(value.dims, dim, new))


def divide(size: Size, by: Size) -> Size | None:
    """size / by if that is whole for certain, else None."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    quotient = sympy.sympify(size) / by
    return quotient if quotient.as_numer_denom()[1] == 1 else None


def _split(value: Value, atom: Atom, inner: Size) -> tuple[Value, Atom, Atom]:
    a, b = Atom(divide(atom.size, inner)), Atom(inner)
    return _rename(value, {atom: ((a, inner), (b, 1))}), a, b


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
                value, outer, inner = _split(value, atom, divide(atom.size, size))
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
    if length == 0 or not atoms:
        raise Opaque("an empty slice")
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

    return _rebuild(value, change, dims=_with(value.dims, dim, () if length == 1 else (new,)))


def _narrow_explicit(value: Value, dim: int, start: int, step: int, length: int) -> Value:
    old, new = value.dims[dim][0], Atom(length)
    others = tuple(a for a in value.explicit if a is not old)
    value = spread(value, (*others, old))
    rows = _count(others)
    chosen = [start + step * i for i in range(length)]
    positions = [r * old.size + c for r in range(rows) for c in chosen]
    if length == 1:
        return dataclasses.replace(_take(value, positions, others), dims=_with(value.dims, dim, ()))
    return dataclasses.replace(
        _take(value, positions, (*others, new)), dims=_with(value.dims, dim, (new,))
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
    return result


def _pad(value: Value, dim: int, start: int, total: int) -> Value:
    old, new = value.dims[dim][0], Atom(total)
    others = tuple(a for a in value.explicit if a is not old)
    value = spread(value, (*others, old))
    rows = _count(others)
    inside = [
        r * old.size + min(max(i - start, 0), old.size - 1)
        for r in range(rows)
        for i in range(total)
    ]
    mask = [start <= i < start + old.size for _ in range(rows) for i in range(total)]
    value = _take(value, inside, (*others, new))
    terms = tuple(
        Term(tuple([c if m else 0.0 for c, m in zip(t.coefficients, mask, strict=True)]), t.factors)
        for t in value.terms
    )
    return dataclasses.replace(value, terms=terms, dims=_with(value.dims, dim, (new,)))


def refresh(value: Value) -> Value:
    """The same value over atoms of its own."""
    return _rename(value, {a: ((Atom(a.size), 1),) for a in value.atoms})


def align(a: Value, b: Value) -> tuple[Value, Value, tuple[tuple[Atom, ...], ...]]:
    """Broadcast two values against each other: the same atoms, the same explicit order; and the
    joint dims.
    """
    b = refresh(b)
    rank = max(len(a.dims), len(b.dims))
    a, b = (dataclasses.replace(v, dims=((),) * (rank - len(v.dims)) + v.dims) for v in (a, b))
    for i in range(rank):
        a, b = _align_dim(a, b, i)
    dims = tuple(x or y for x, y in zip(a.dims, b.dims, strict=True))
    for atom in a.explicit:
        b = explode(b, atom) if _uses(b, atom) else b
    for atom in b.explicit:
        a = explode(a, atom) if _uses(a, atom) else a
    explicit = tuple(dict.fromkeys((*a.explicit, *b.explicit)))
    return spread(a, explicit), spread(b, explicit), dims


def _uses(value: Value, atom: Atom) -> bool:
    return atom in value.atoms


def _align_dim(a: Value, b: Value, i: int) -> tuple[Value, Value]:
    x, y = list(a.dims[i]), list(b.dims[i])
    if not x or not y:
        return a, b
    while x and y:
        p, q = x.pop(0), y.pop(0)
        if p.size == q.size:
            b = _rename(b, {q: ((p, 1),)})
        elif (inner := divide(p.size, q.size)) is not None:
            a, outer, rest = _split(a, p, inner)
            b = _rename(b, {q: ((outer, 1),)})
            x.insert(0, rest)
        elif (inner := divide(q.size, p.size)) is not None:
            b, outer, rest = _split(b, q, inner)
            b = _rename(b, {outer: ((p, 1),)})
            y.insert(0, rest)
        else:
            raise Opaque(f"axes of {p.size} and {q.size} that do not line up")
    if x or y:
        raise Opaque("axes that do not line up")
    return a, b


def multiply(a: Value, b: Value, dtype: torch.dtype | None = None) -> Value:
    a, b, dims = align(a, b)
    if len(a.terms) * len(b.terms) > MAX_TERMS:
        raise Opaque("a product of too many terms")
    terms = []
    for s in a.terms:
        for t in b.terms:
            if len(s.factors) + len(t.factors) > MAX_FACTORS:
                raise Opaque("a product of too many factors")
            coefficients = tuple(
                [x * y for x, y in zip(s.coefficients, t.coefficients, strict=True)]
            )
            factors = sorted((*s.factors, *t.factors), key=lambda f: f.leaf.number)
            terms.append(Term(coefficients, tuple(factors)))
    return Value(dims, a.explicit, _merged(terms), dtype or a.dtype)


def add(a: Value, b: Value, dtype: torch.dtype | None = None) -> Value:
    a, b, dims = align(a, b)
    terms = _merged((*a.terms, *b.terms))
    if len(terms) > MAX_TERMS:
        raise Opaque("a sum of too many terms")
    return Value(dims, a.explicit, terms, dtype or a.dtype)


def scaled(value: Value, by: complex, dtype: torch.dtype | None = None) -> Value:
    terms = tuple(Term(tuple([c * by for c in t.coefficients]), t.factors) for t in value.terms)
    return dataclasses.replace(value, terms=terms, dtype=dtype or value.dtype)


def mapped(value: Value, change: Callable[[complex], complex], dtype: torch.dtype) -> Value:
    """Apply `change` (conjugate, real part, imaginary part) to the coefficients; the leaves are
    real.
    """
    terms = tuple(Term(tuple([change(c) for c in t.coefficients]), t.factors) for t in value.terms)
    kept = tuple(t for t in terms if any(t.coefficients))
    return dataclasses.replace(value, terms=kept, dtype=dtype)


def _merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Add up terms that read the same leaves at the same places, or at disjoint positions."""
    result: list[Term] = []
    for term in terms:
        if not any(term.coefficients):
            continue
        for i, other in enumerate(result):
            if (joint := _join(other, term)) is not None:
                result[i] = joint
                break
        else:
            result.append(term)
    return tuple(t for t in result if any(t.coefficients))


def _join(a: Term, b: Term) -> Term | None:
    if len(a.factors) != len(b.factors):
        return None
    for f, g in zip(a.factors, b.factors, strict=True):
        if f.leaf is not g.leaf or any(
            set(i.strides) != set(j.strides) for i, j in zip(f.axes, g.axes, strict=True)
        ):
            return None
    if all(f.axes == g.axes for f, g in zip(a.factors, b.factors, strict=True)):
        total = tuple([x + y for x, y in zip(a.coefficients, b.coefficients, strict=True)])
        return Term(total, a.factors)
    if any(x and y for x, y in zip(a.coefficients, b.coefficients, strict=True)):
        return None
    first = [bool(x) for x in a.coefficients]
    factors = tuple(
        Factor(
            f.leaf,
            tuple(
                Index(
                    tuple(
                        [p if m else q for m, p, q in zip(first, i.offsets, j.offsets, strict=True)]
                    ),
                    i.strides,
                )
                for i, j in zip(f.axes, g.axes, strict=True)
            ),
        )
        for f, g in zip(a.factors, b.factors, strict=True)
    )
    total = tuple([x or y for x, y in zip(a.coefficients, b.coefficients, strict=True)])
    return Term(total, factors)
