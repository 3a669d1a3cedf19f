"""Sums and products of Values, broadcast against each other."""

import dataclasses
from collections.abc import Callable, Iterable

import torch

from fxfuse.patterns.atoms import divide, explode, rename, split_atom, spread
from fxfuse.patterns.value import (
    MAX_FACTORS,
    MAX_TERMS,
    Atom,
    Factor,
    Index,
    Opaque,
    Term,
    Value,
)


def refresh(value: Value) -> Value:
    """The same value over atoms of its own."""
    return rename(value, {a: ((Atom(a.size), 1),) for a in value.atoms})


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
            b = rename(b, {q: ((p, 1),)})
        elif (inner := divide(p.size, q.size)) is not None:
            a, outer, rest = split_atom(a, p, inner)
            b = rename(b, {q: ((outer, 1),)})
            x.insert(0, rest)
        elif (inner := divide(q.size, p.size)) is not None:
            b, outer, rest = split_atom(b, q, inner)
            b = rename(b, {outer: ((p, 1),)})
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
