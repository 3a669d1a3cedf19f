"""Tensors and calls as the lens sees them."""

import dataclasses
import functools
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.fx.node import map_aggregate

Size: TypeAlias = Any  # an int, or a sympy expression under dynamic shapes


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A float of the graph: a node whose value is a SymFloat."""

    node: fx.Node
    example: torch.SymFloat


@dataclasses.dataclass(eq=False)
class Slot:
    """One tensor as one call returned it (or as the graph received it)."""

    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size
    dtype: torch.dtype
    device: torch.device
    storage: int
    node: fx.Node
    call: "Call | None" = dataclasses.field(default=None, repr=False)

    def is_dense(self) -> bool:
        """Whether its elements lie side by side, in the order of its axes."""
        expected: Size = 1
        for size, stride in reversed(list(zip(self.shape, self.stride, strict=True))):
            if size != 1 and stride != expected:
                return False
            expected = expected * size
        return True


@dataclasses.dataclass(eq=False)
class Call:
    """One ATen call; op None: a call that was not understood, and may have written to any input."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: fx.Node
    outs: tuple[Slot, ...] = ()
    writes: tuple[Slot, ...] = ()

    def inputs(self) -> tuple[Slot, ...]:
        """The slots in the arguments, in order."""
        return self._inputs

    @functools.cached_property
    def _inputs(self) -> tuple[Slot, ...]:
        return tuple(slots_of((self.args, self.kwargs)))


def slots_of(tree: Any) -> list[Slot]:
    """The slots in nested tuples, lists, dicts and slices, in order."""
    found: list[Slot] = []
    map_aggregate(tree, lambda x: found.append(x) if isinstance(x, Slot) else None)
    return found


@dataclasses.dataclass
class View:
    """The whole graph through the lens."""

    graph: fx.Graph
    calls: list[Call]
    results: dict[fx.Node, Any]
    opaque: dict[fx.Node, str] = dataclasses.field(default_factory=dict)

    def holders(self) -> dict[Slot, fx.Node]:
        """The first node whose result is a slot, for each slot that is a node's whole result."""
        holders: dict[Slot, fx.Node] = {}
        for node, result in self.results.items():
            if isinstance(result, Slot):
                holders.setdefault(result, node)
        return holders
