"""Prove: a decoded stream's Value and the op's reference, run on small random float64 inputs, must
agree.

The Value is evaluated from random tensors at its leaves, the reference from views of the same
tensors. Batch and token axes are shrunk to a few rows where one atom walks them alone. Random
numbers come from a Generator of this module: the user's random state, default device and default
dtype are neither felt nor touched.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch

from fxfuse import reference
from fxfuse.patterns.evaluate import evaluate
from fxfuse.patterns.fingerprint import fingerprint
from fxfuse.patterns.site import Access, Decoded
from fxfuse.patterns.value import (
    Atom,
    Definition,
    Index,
    Leaf,
    Size,
    Value,
    is_statistic,
    product,
)
from fxfuse.slots import Scalar

TOLERANCE = 1e-9
MAX_ELEMENTS = 1 << 24


class Disproved(Exception):
    """The reference computes something else than the graph: a bug of fxfuse, found before it could
    matter.
    """


class Untried(Exception):
    """The stream cannot be tried on small inputs, so it is not fused."""


_proved: set[str] = set()

# A stream's reference: of x, stream, weight, bias, scale, cos, sin and eps.
Run: TypeAlias = Callable[..., torch.Tensor]


def prove(decoded: Decoded, run: Run = reference.row) -> None:
    """Raises Disproved or Untried unless `run` computes what the stream's Value says. Proofs are
    remembered.
    """
    key = f"{run.__name__} {decoded.stream} {fingerprint(decoded)}"
    if key in _proved:
        return
    with torch.device("cpu"), torch.no_grad():
        error = max(_error(decoded, size, run) for size in _sizes(decoded))
    if not error <= TOLERANCE:
        raise Disproved(f"the reference differs from the graph's value by {error:.1e}")
    _proved.add(key)


def _sizes(decoded: Decoded) -> tuple[float, ...]:
    """How large the source's rows are tried: also so small that a norm's eps decides."""
    small = isinstance(decoded.eps, float) and decoded.eps > 0
    return (1.0, decoded.eps / 10) if small and isinstance(decoded.eps, float) else (1.0,)


def _error(decoded: Decoded, size: float, run: Run) -> float:
    sizes = _Sizes(decoded)
    generator = torch.Generator(device="cpu").manual_seed(0x5EED)
    tensors = {
        leaf: torch.randn(sizes.shape(leaf), dtype=torch.float64, generator=generator, device="cpu")
        for leaf in _leaves(decoded)
    }
    tensors[decoded.x.leaf] *= size
    want = canonical(evaluate(decoded.value, tensors, sizes.atom), decoded.rows)
    got = _reference(decoded, tensors, run)
    if got.shape != want.shape:
        raise Disproved(f"the reference has shape {list(got.shape)}, the value {list(want.shape)}")
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def canonical(x: torch.Tensor, rows: tuple[int | None, int | None, int | None]) -> torch.Tensor:
    """A value's tensor as [B, T, H, D]."""
    last = x.dim() - 1
    kept = [r for r in rows if r is not None]
    extra = [d for d in range(last) if d not in kept]
    shape = [*(x.shape[r] for r in kept), x.shape[last]]
    x = x.permute(*extra, *kept, last).reshape(shape)
    for place, row in enumerate(rows):
        if row is None:
            x = x.unsqueeze(place)
    return x


def _leaves(decoded: Decoded) -> list[Leaf]:
    """Every leaf that the reference takes, or that no definition explains."""
    operands = {a.leaf for a in decoded.accesses()}
    found: dict[Leaf, None] = dict.fromkeys(operands)

    def visit(value: Value) -> None:
        for leaf in value.leaves():
            if leaf.definition is None or leaf in operands:
                found[leaf] = None
                continue
            for operand in leaf.definition.operands:
                visit(operand)

    visit(decoded.value)
    return list(found)


class _Sizes:
    """Small sizes for the batch and token atoms, and so for the leaf axes they walk."""

    def __init__(self, decoded: Decoded) -> None:
        self.atoms: dict[Atom, int] = {}
        self.axes: dict[tuple[Leaf, int], int] = {}
        self.operands = {a.leaf for a in decoded.accesses()}
        value = decoded.value
        rows = [(r, 2 + i) for i, r in enumerate(decoded.rows[:2]) if r is not None]
        small = {value.dims[r][0]: n for r, n in rows if len(value.dims[r]) == 1}
        self._walk(value, {a: n for a, n in small.items() if _walks_whole_axes(value, a)})

    def atom(self, atom: Atom) -> Size:
        return self.atoms.get(atom, atom.size)

    def shape(self, leaf: Leaf) -> list[int]:
        shape = [self.axes.get((leaf, j), s) for j, s in enumerate(leaf.shape)]
        if not all(isinstance(s, int) for s in shape):
            raise Untried(f"a tensor of unknown shape {shape} cannot be tried")
        if torch.Size(shape).numel() > MAX_ELEMENTS:
            raise Untried(f"a tensor of shape {shape} is too large to be tried")
        return shape

    def _walk(self, value: Value, small: dict[Atom, int]) -> None:
        self.atoms |= small
        for term in value.terms:
            for factor in term.factors:
                axes = {
                    j: small[parts[0]] * product(a.size for a in parts[1:])
                    for j, index in enumerate(factor.axes)
                    if (parts := _parts(index)) and parts[0] in small
                }
                self.axes |= {(factor.leaf, j): n for j, n in axes.items()}
                if factor.leaf.definition is not None and factor.leaf not in self.operands:
                    self._define(factor.leaf.definition, axes)

    def _define(self, definition: Definition, axes: dict[int, int]) -> None:
        for operand in definition.operands:
            kept = list(range(len(operand.dims)))
            if definition.op == "mean" and not definition.params[1]:
                kept = [d for d in kept if d not in definition.params[0]]
            small: dict[Atom, int] = {}
            for dim, n in ((operand.dims[kept[j]], n) for j, n in axes.items() if j < len(kept)):
                # Of joined rows the outermost part is the one that became smaller.
                rest = product(a.size for a in dim[1:])
                if not dim or not isinstance(rest, int) or n % rest:
                    raise Untried("a row statistic over regrouped rows cannot be tried")
                small[dim[0]] = n // rest
            self._walk(operand, small)


def _parts(index: Index) -> tuple[Atom, ...]:
    """The atoms that walk an axis, the outermost first; none where a stride is symbolic."""
    if not all(isinstance(stride, int) for _, stride in index.strides):
        return ()
    return tuple(a for a, _ in sorted(index.strides, key=lambda walk: -walk[1]))


def _walks_whole_axes(value: Value, atom: Atom) -> bool:
    """Whether every leaf axis that the atom walks is walked from end to end, by it alone; of a
    statistic, whose rows may be joined, by it as the outermost.
    """

    def whole(leaf: Leaf, index: Index, size: Size) -> bool:
        parts, step = _parts(index), 1
        for part in reversed(parts):
            if index.stride(part) != step:
                return False
            step *= part.size
        first = parts[:1] == (atom,) and (len(parts) == 1 or is_statistic(leaf))
        return first and step == size and not any(index.offsets)

    return all(
        whole(factor.leaf, index, size)
        for term in value.terms
        for factor in term.factors
        for index, size in zip(factor.axes, factor.leaf.shape, strict=True)
        if index.stride(atom)
    )


def _reference(decoded: Decoded, tensors: dict[Leaf, torch.Tensor], run: Run) -> torch.Tensor:
    def operand(access: Access | None) -> torch.Tensor | None:
        if access is None:
            return None
        x = tensors[access.leaf]
        if access.leaf.part:
            parts = {leaf.part: t for leaf, t in tensors.items() if leaf.slot is access.leaf.slot}
            x = torch.complex(parts["re"], parts["im"])
        return access.apply(x)

    eps = decoded.eps
    if isinstance(eps, Scalar):
        eps = next(float(t) for leaf, t in tensors.items() if leaf.slot == eps)
    operands = (decoded.x, decoded.weight, decoded.bias, decoded.scale, decoded.cos, decoded.sin)
    x, weight, bias, scale, cos, sin = map(operand, operands)
    assert x is not None
    stream = dataclasses.replace(decoded.stream, dtype="float64")
    return run(x, stream, weight, bias, scale, cos, sin, eps)
