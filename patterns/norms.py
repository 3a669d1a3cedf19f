"""Norm kinds: the row statistics a norm divides by, one table entry each.

An entry reads the statistic backwards from its leaf into a `Statistic`, or raises Refused, and says
what a row is multiplied by, given the mean of its squares and eps. The reference, the proof and the
loops follow from that; the Triton kernel knows "rms", other kinds get loops.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.value import (
    Atom,
    Factor,
    Index,
    Kind,
    Leaf,
    Size,
    Term,
    Value,
    leaf_value,
    product,
)
from fxfuse.slots import Scalar


@dataclasses.dataclass(frozen=True)
class Statistic:
    """Over `count` channels of `base` from `start`, heads `stride` apart, with the graph's eps."""

    kind: str
    base: Leaf
    count: int
    start: int
    stride: int
    eps: float | Scalar


DATA = Kind.DATA

Read: TypeAlias = Callable[[Leaf], Statistic]
RowFactor: TypeAlias = Callable[[torch.Tensor, float], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class NormKind:
    """How a statistic is read, and the factor a row gets from its mean of squares and eps."""

    read: Read
    factor: RowFactor


NORM_KINDS: dict[str, NormKind] = {}


def norm_kind(name: str, factor: RowFactor) -> Callable[[Read], Read]:
    """Enter a norm kind into the table."""

    def register(read: Read) -> Read:
        NORM_KINDS[name] = NormKind(read, factor)
        return read

    return register


@norm_kind("rms", factor=lambda mean, eps: torch.rsqrt(mean + eps))
def _rms(leaf: Leaf) -> Statistic:
    """rsqrt(mean(x * x) + eps), also as a power of -0.5 or as the reciprocal of a root."""
    mean, rest = split_mean(under_root(leaf))
    return mean_of_squares("rms", mean, eps_of(rest))


def read_statistic(leaf: Leaf) -> Statistic:
    """The statistic a leaf holds, by the first kind that reads it. Raises Refused."""
    reasons = []
    for kind in NORM_KINDS.values():
        try:
            return kind.read(leaf)
        except Refused as reason:
            reasons.append(str(reason))
    raise Refused("; ".join(reasons))


def op_of(leaf: Leaf) -> str:
    """The op that a leaf's definition names, or nothing."""
    return leaf.definition.op if leaf.definition else ""


EXPONENTS = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0}


def under_root(leaf: Leaf) -> Value:
    """v of 1 / sqrt(v), in one op or in several."""
    exponent, value, inner = 1.0, leaf_value(leaf), leaf
    while (definition := inner.definition) is not None and definition.op in EXPONENTS:
        exponent *= EXPONENTS[definition.op]
        value = definition.operands[0]
        if len(value.terms) != 1 or len(value.terms[0].factors) != 1 or not _is_one(value.terms[0]):
            break
        inner = value.terms[0].factors[0].leaf
    if exponent != -0.5:
        raise Refused(f"a row factor that is no rsqrt but {op_of(leaf) or 'unknown'}")
    return value


def _is_one(term: Term) -> bool:
    """Whether a term's coefficients are 1, but for the rounding of a sum over n that is divided."""
    return all(abs(c - 1) <= 1e-15 for c in term.coefficients)


def base_of(statistic: Factor, base: Leaf) -> Factor:
    """The base of a row statistic, read at the rows for which the statistic is read."""
    factor = statistic
    while factor.leaf is not base and (definition := factor.leaf.definition) is not None:
        inner = definition.operands[0]
        kept, places = list(range(len(inner.dims))), dict[Atom, Index]()
        if definition.op == "mean":
            reduced, keepdim = definition.params
            places = {a: Index((0,)) for d in reduced for a in inner.dims[d]}
            kept = [d for d in kept if keepdim or d not in reduced]
        held = [t.factors[0] for t in inner.terms if t.factors and t.factors[0].leaf.kind is DATA]
        dims = [inner.dims[d] for d in kept]
        if len(held) != 1 or inner.explicit or any(len(dim) > 1 for dim in dims):
            raise Refused("a statistic of regrouped rows")
        places = {d[0]: at for d, at in zip(dims, factor.axes, strict=True) if d} | places
        axes = tuple(_composed(index, places) for index in held[0].axes)
        factor = Factor(held[0].leaf, axes)
    return factor


def rows_of(factor: Factor) -> list[tuple[int, frozenset[tuple[Atom, int]]]]:
    """At which rows and heads a factor is read."""
    offsets = [*(index.offsets[0] for index in factor.axes[:-1]), 0]
    strides = [frozenset((a, s) for a, s in index.strides if s) for index in factor.axes]
    return list(zip(offsets, strides, strict=True))


def order_of(value: Value, z: Factor) -> list[int]:
    """The order of z's axes that gives value's dims. Raises Refused unless z is read whole."""
    order: list[int] = []
    for dim in value.dims:
        axes = enumerate(zip(z.axes, z.leaf.shape, strict=True))
        fits = [j for j, (i, n) in axes if j not in order and _is_whole(i, n, dim, value)]
        order += fits[:1]
    if sorted(order) != list(range(len(z.axes))) or len(order) != len(value.dims):
        raise Refused("a rotated value that is cut, moved or regrouped before its norm")
    return order


def _is_whole(index: Index, size: Size, dim: tuple[Atom, ...], value: Value) -> bool:
    """Whether a dim walks an axis of that size from end to end."""
    if dim and dim == value.explicit:
        return not index.strides and index.offsets == tuple(range(size))
    steps = {a: product(b.size for b in dim[i + 1 :]) for i, a in enumerate(dim)}
    return (
        dict(index.strides) == steps
        and not any(index.offsets)
        and product(a.size for a in dim) == size
    )


def _composed(index: Index, places: dict[Atom, Index]) -> Index:
    """An index with each of its atoms at the place another index gives."""
    offset, strides = index.offsets[0], dict[Atom, int]()
    for atom, step in index.strides:
        at = places.get(atom, Index((0,), ((atom, 1),)))
        if len(set(at.offsets)) > 1:
            raise Refused("a statistic that differs by channel")
        offset += step * at.offsets[0]
        for inner, stride in at.strides:
            strides[inner] = strides.get(inner, 0) + step * stride
    return Index((offset,), tuple(strides.items()))


def split_mean(value: Value) -> tuple[Leaf, list[Term]]:
    """The mean in a sum of one mean and other terms, and those terms."""
    means = [t for t in value.terms if t.factors and op_of(t.factors[0].leaf) == "mean"]
    if len(means) != 1 or len(means[0].factors) != 1 or not _is_one(means[0]):
        raise Refused("a root of something else than a mean of squares")
    return means[0].factors[0].leaf, [t for t in value.terms if t is not means[0]]


def mean_of_squares(kind: str, mean: Leaf, eps: float | Scalar) -> Statistic:
    """The statistic of a mean over the squares of a row's channels."""
    definition = mean.definition
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
    stride = kept[0] if len(kept) == 1 else 0
    return Statistic(kind, base, reduced[0].size, index.offsets[0], stride, eps)


def eps_of(terms: Sequence[Term]) -> float | Scalar:
    """The scalar that is added to a mean, as a number or as a float of the graph."""
    if not terms:
        return 0.0
    if len(terms) > 1 or len(terms[0].factors) > 1 or len(set(terms[0].coefficients)) > 1:
        raise Refused("an eps that is no scalar")
    term = terms[0]
    if not term.factors:
        return real(term.coefficients[0])
    slot = term.factors[0].leaf.slot
    if not isinstance(slot, Scalar) or term.coefficients[0] != 1:
        raise Refused("an eps that is no scalar")
    return slot


def without_offset(leaf: Leaf) -> tuple[Leaf, float]:
    """The raw weight and the number a float32 sum adds to it."""
    if op_of(leaf) != "offset" or leaf.definition is None:
        return leaf, 0.0
    inner, (number,) = leaf.definition.operands[0], leaf.definition.params
    term = inner.terms[0]
    whole = len(inner.terms) == 1 and len(term.factors) == 1 and set(term.coefficients) == {1.0}
    if whole and inner.shape == term.factors[0].leaf.shape:
        return term.factors[0].leaf, float(number)
    return leaf, 0.0


def real(number: complex) -> float:
    """A coefficient that must be real."""
    if isinstance(number, complex) and number.imag:
        raise Refused("a complex factor")
    return float(number.real)
