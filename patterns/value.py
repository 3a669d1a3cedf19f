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
import math
from collections.abc import Iterable
from enum import Enum
from typing import Any, TypeAlias

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


STATISTICS = frozenset({"mean", "rsqrt", "sqrt", "reciprocal", "clamp_min"})


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
