"""Norm kinds: the row statistics a norm divides by, one table entry each.

An entry reads the statistic backwards from its leaf into a `Statistic`, or raises Refused, and says
what a row is multiplied by, given the mean of its squares and eps. The reference, the proof, the
gradient and the loops follow from that; the Triton kernel knows "rms", other kinds get loops.
"""

import dataclasses
import math
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
    """`scale` times the kind's factor, over `count` channels of `base` from `start`, heads `stride`
    apart, with the eps that the factor takes. `centred` names the rows without their mean.
    """

    kind: str
    base: Leaf
    count: int
    start: int
    stride: int
    eps: float | Scalar
    scale: float = 1.0
    centred: Leaf | None = None


DATA = Kind.DATA

Read: TypeAlias = Callable[[Leaf], Statistic]
RowFactor: TypeAlias = Callable[[torch.Tensor, float], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class NormKind:
    """How a statistic is read, and the factor a row gets from its mean of squares and eps.

    slope    the factor's derivative by the mean; without it the kind has no gradient
    centred  the row's mean is taken off it first
    """

    read: Read
    factor: RowFactor
    slope: RowFactor | None = None
    centred: bool = False


NORM_KINDS: dict[str, NormKind] = {}


def norm_kind(
    name: str, factor: RowFactor, slope: RowFactor | None = None, *, centred: bool = False
) -> Callable[[Read], Read]:
    """Enter a norm kind into the table."""

    def register(read: Read) -> Read:
        NORM_KINDS[name] = NormKind(read, factor, slope, centred)
        return read

    return register


def _inverse_root(mean: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(mean + eps)


def _inverse_root_slope(mean: torch.Tensor, eps: float) -> torch.Tensor:
    return -0.5 * torch.rsqrt(mean + eps) ** 3


def _clamped(mean: torch.Tensor, eps: float) -> torch.Tensor:
    return 1 / mean.sqrt().clamp_min(eps)


def _clamped_slope(mean: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.where(mean.sqrt() < eps, 0.0, -0.5 * _clamped(mean, eps) ** 3)


@norm_kind("rms", _inverse_root, _inverse_root_slope)
def _rms(leaf: Leaf) -> Statistic:
    """rsqrt(mean(x * x) + eps), also as a power of -0.5 or as the reciprocal of a root; a sum of
    squares is a multiple of their mean.
    """
    return _under_a_sum("rms", under_root(leaf))


@norm_kind("l2", _clamped, _clamped_slope)
def _l2(leaf: Leaf) -> Statistic:
    """1 / max(sqrt(mean(x * x)), eps), and multiples of it."""
    root = under_root(leaf)
    mean, share, rest = split_mean(root.value)
    if not root.floor or rest:
        raise Refused("a root that is not clamped, or a sum")
    return mean_of_squares(
        "l2", mean, math.sqrt(root.floor / share), scale=root.scale / math.sqrt(share)
    )


@norm_kind("layer", _inverse_root, _inverse_root_slope, centred=True)
def _layer(leaf: Leaf) -> Statistic:
    """As rms, over the squares of a row without its mean."""
    return _under_a_sum("layer", under_root(leaf))


def _under_a_sum(kind: str, root: "Root") -> Statistic:
    """1 / sqrt(mean + eps)."""
    if root.floor:
        raise Refused("a root of something that is clamped")
    mean, share, rest = split_mean(root.value)
    eps = eps_of(rest)
    if share != 1.0:
        if isinstance(eps, Scalar):
            raise Refused("an eps of the graph beside a sum of squares")
        eps = eps / share
    return mean_of_squares(kind, mean, eps, scale=root.scale / math.sqrt(share))


def read_statistic(leaf: Leaf) -> Statistic:
    """The statistic a leaf holds, by the first kind that reads it. Raises Refused."""
    reasons = []
    for kind in NORM_KINDS.values():
        try:
            return kind.read(leaf)
        except Refused as reason:
            reasons.append(str(reason))
    raise Refused("; ".join(dict.fromkeys(reasons)))


def op_of(leaf: Leaf) -> str:
    """The op that a leaf's definition names, or nothing."""
    return leaf.definition.op if leaf.definition else ""


EXPONENTS = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0}


@dataclasses.dataclass(frozen=True)
class Root:
    """scale / sqrt(max(value, floor))"""

    value: Value
    scale: float
    floor: float


def under_root(leaf: Leaf) -> Root:
    """A leaf as 1 / sqrt(v), in one op or in several, with factors and a clamp between them."""
    exponent, scale, floor, value, inner = 1.0, 1.0, 0.0, leaf_value(leaf), leaf
    while (definition := inner.definition) is not None:
        if definition.op == "clamp_min":
            floor = max(floor, *definition.params)
        elif (power := EXPONENTS.get(definition.op)) is None:
            break
        else:
            if floor and power < 0:
                raise Refused("a clamp of a reciprocal")
            exponent, floor = exponent * power, floor and floor ** (1 / power)
        value = definition.operands[0]
        share = _share_of_one(value)
        if share is None:
            break
        scale, floor = scale * share**exponent, floor / share
        inner = value.terms[0].factors[0].leaf
        value = leaf_value(inner)
    if exponent != -0.5:
        raise Refused(f"a row factor that is no rsqrt but {op_of(leaf) or 'unknown'}")
    return Root(value, scale, floor)


def _share_of_one(value: Value) -> float | None:
    """c of c * leaf, for a positive c; None for any other value."""
    if len(value.terms) != 1 or len(value.terms[0].factors) != 1:
        return None
    return _share(value.terms[0])


def _share(term: Term) -> float | None:
    """A term's positive coefficient; 1 also where the rounding of a sum over n that is divided by n
    leaves something near it.
    """
    first = term.coefficients[0]
    if len(set(term.coefficients)) > 1 or isinstance(first, complex) or first <= 0:
        return None
    return 1.0 if abs(first - 1) <= 1e-15 else float(first)


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
        if len(held) != 1 or inner.explicit:
            raise Refused("a statistic of several rows")
        for dim, at in zip(dims, factor.axes, strict=True):
            places |= _digits(at, dim)
        axes = tuple(composed(index, places) for index in held[0].axes)
        if any(len(set(index.offsets)) > 1 for index in axes):
            raise Refused("a statistic that differs by channel")
        factor = Factor(held[0].leaf, axes)
    return factor


def _digits(index: Index, dim: tuple[Atom, ...]) -> dict[Atom, Index]:
    """Where each atom of an axis stands, for an index on that axis: rows that were joined into one
    axis and are taken apart the same way again. Raises Refused where it is another way.
    """
    offsets, parts = set(index.offsets), dict[Atom, Index]()
    if len(dim) == 1:
        return {dim[0]: index}
    if offsets - {0}:
        raise Refused("a statistic of regrouped rows")
    strides = {a: s for a, s in index.strides if s}
    for i, atom in enumerate(dim):
        step = product(a.size for a in dim[i + 1 :])
        # Of the first part no more may be walked than there is; of the others all of it, or none.
        fits = [a for a, s in strides.items() if s == step and (i == 0 or a.size == atom.size)]
        for a in fits[:1]:
            del strides[a]
        parts[atom] = Index((0,), tuple((a, 1) for a in fits[:1]))
    if strides:
        raise Refused("a statistic of regrouped rows")
    return parts


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


def composed(index: Index, places: dict[Atom, Index]) -> Index:
    """An index with each of its atoms at the place another index gives."""
    offsets, strides = index.offsets, dict[Atom, int]()
    for atom, step in index.strides:
        at = places.get(atom, Index((0,), ((atom, 1),)))
        count = max(len(offsets), len(at.offsets))
        pairs = zip(_spread(offsets, count), _spread(at.offsets, count), strict=True)
        offsets = tuple([o + step * p for o, p in pairs])
        for inner, stride in at.strides:
            strides[inner] = strides.get(inner, 0) + step * stride
    return Index(offsets, tuple(strides.items()))


def _spread(offsets: tuple[int, ...], count: int) -> tuple[int, ...]:
    return offsets if len(offsets) == count else offsets * count


def split_mean(value: Value) -> tuple[Leaf, float, list[Term]]:
    """The mean in a sum of a multiple of one mean and other terms, the multiple, and those
    terms.
    """
    means = [t for t in value.terms if t.factors and op_of(t.factors[0].leaf) == "mean"]
    share = _share(means[0]) if len(means) == 1 and len(means[0].factors) == 1 else None
    if share is None:
        raise Refused("a root of something else than a mean of squares")
    return means[0].factors[0].leaf, share, [t for t in value.terms if t is not means[0]]


def mean_of_squares(kind: str, mean: Leaf, eps: float | Scalar, *, scale: float = 1.0) -> Statistic:
    """The statistic of a mean over the squares of a row's channels."""
    definition = mean.definition
    assert definition is not None
    square, (dims, _) = definition.operands[0], definition.params
    if len(square.terms) != 1 or set(square.terms[0].coefficients) != {1.0}:
        raise Refused("a mean of something else than squares")
    factors = square.terms[0].factors
    if len(factors) != 2 or factors[0] != factors[1]:
        raise Refused("a mean of something else than squares")
    factor, centred = factors[0], is_centred(factors[0].leaf)
    if centred != NORM_KINDS[kind].centred:
        raise Refused(f"squares of a row {'without' if centred else 'with'} its mean")
    reduced = [a for d in dims for a in square.dims[d]]
    if len(reduced) != 1 or len(set(factor.axes[-1].offsets)) != 1:
        raise Refused("a mean over other elements than a row's channels")
    if centred and factor.axes[-1] != Index((0,), ((reduced[0], 1),)):
        raise Refused("a mean over other elements than those whose mean was taken off")
    whole = factor.leaf if centred else None
    factor = before_centring(factor) or factor
    base, index = factor.leaf, factor.axes[-1]
    if index.stride(reduced[0]) != 1:
        raise Refused("a mean over other elements than a row's channels")
    kept = [s for a, s in index.strides if a is not reduced[0]]
    stride = kept[0] if len(kept) == 1 else 0
    return Statistic(kind, base, reduced[0].size, index.offsets[0], stride, eps, scale, whole)


def is_centred(leaf: Leaf) -> bool:
    """Whether a leaf names rows without their mean."""
    return op_of(leaf) == "centred"


def before_centring(factor: Factor) -> Factor | None:
    """What a factor of centred rows reads of the rows as they were, if one leaf holds those."""
    definition = factor.leaf.definition
    if definition is None or definition.op != "centred":
        return None
    inner = definition.operands[0]
    term = inner.terms[0]
    if len(inner.terms) > 1 or len(term.factors) > 1 or set(term.coefficients) != {1.0}:
        return None
    if inner.explicit or any(len(dim) > 1 for dim in inner.dims):
        return None
    places = {dim[0]: at for dim, at in zip(inner.dims, factor.axes, strict=True) if dim}
    return Factor(
        term.factors[0].leaf, tuple(composed(index, places) for index in term.factors[0].axes)
    )


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
