"""Evaluate a Value from tensors at its leaves: the reader's own proof.

For each term, every factor is gathered at its index maps, the factors are multiplied, the terms
added. A leaf without a tensor is computed from its definition.
"""

from collections.abc import Callable, Mapping

import torch

from fxfuse.patterns.transfer_arithmetic import DEFINITIONS
from fxfuse.patterns.value import Atom, Index, Leaf, Size, Value


def evaluate(
    value: Value,
    tensors: Mapping[Leaf, torch.Tensor],
    size_of: Callable[[Atom], Size] = lambda atom: atom.size,
) -> torch.Tensor:
    """The tensor a Value stands for, in the dtype of its leaves' tensors. `size_of` may give an
    atom another size.
    """
    dtype = next(iter(tensors.values())).dtype
    grid = _Grid(value, size_of)
    known = dict(tensors)
    total = torch.zeros(grid.sizes, dtype=dtype)
    for term in value.terms:
        is_complex = any(isinstance(c, complex) for c in term.coefficients)
        exact = torch.complex128 if is_complex else torch.float64
        coefficient = torch.tensor(term.coefficients, dtype=exact)
        part = grid.on_explicit(coefficient if is_complex else coefficient.to(dtype))
        for factor in term.factors:
            tensor = _leaf(factor.leaf, known, size_of)
            part = part * tensor[tuple(grid.index(i) for i in factor.axes)]
        total = total + part
    return total.reshape([_product(size_of(a) for a in dim) for dim in value.dims])


def _leaf(
    leaf: Leaf, known: dict[Leaf, torch.Tensor], size_of: Callable[[Atom], Size]
) -> torch.Tensor:
    if leaf not in known:
        if leaf.definition is None:
            raise KeyError(f"no tensor for the leaf {leaf}")
        operands = [evaluate(x, known, size_of) for x in leaf.definition.operands]
        known[leaf] = DEFINITIONS[leaf.definition.op](*operands, *leaf.definition.params)
    return known[leaf]


class _Grid:
    """Index tensors over a Value's atoms, each atom an axis."""

    def __init__(self, value: Value, size_of: Callable[[Atom], Size]) -> None:
        extra = [a for a in value.explicit if a not in value.atoms]
        self.atoms = [*extra, *value.atoms]
        self.sizes = [size_of(a) for a in self.atoms]
        self.explicit = value.explicit

    def on_explicit(self, x: torch.Tensor) -> torch.Tensor:
        """A tuple over the explicit atoms, as a tensor over all atoms."""
        x = x.reshape([a.size for a in self.explicit])
        places = [self.atoms.index(a) for a in self.explicit]
        order = sorted(range(len(places)), key=places.__getitem__)
        shape = [a.size if a in self.explicit else 1 for a in self.atoms]
        return x.permute(order).reshape(shape)

    def index(self, index: Index) -> torch.Tensor:
        total = self.on_explicit(torch.tensor(index.offsets))
        for atom, stride in index.strides:
            place = self.atoms.index(atom)
            shape = [1] * len(self.atoms)
            shape[place] = self.sizes[place]
            total = total + stride * torch.arange(self.sizes[place]).reshape(shape)
        return total


def _product(sizes: object) -> int:
    total = 1
    for size in sizes:  # type: ignore[attr-defined]
        total *= size
    return total
