"""Elements that a graph chooses by index tensors whose numbers stand in the model's own code.

    x[torch.tensor([0, 1, 2, 1]), :, torch.arange(4)]    x.gather(0, torch.tensor([[[0, 1, 2, 1]]]))

In comes such a call and the Value of its tensor; out comes the Value of what it chooses.
What an input of the graph has a say in, a buffer for one, is no number that is known: `Opaque`.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch.fx.node import map_aggregate

from fxfuse.patterns import shapes
from fxfuse.patterns.atoms import count_of, flatten_explicit, spread, take
from fxfuse.patterns.transfer import NOT_FORESEEN
from fxfuse.patterns.value import Atom, Opaque, Value
from fxfuse.slots import Call, Slot

aten = torch.ops.aten

# What may stand between the numbers in the code and the call that chooses by them.
SIMPLE = frozenset(
    {
        aten._to_copy.default,
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.detach.default,
        aten.floor_divide.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.slice.Tensor,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
PLACES = ("device", "layout", "memory_format", "pin_memory")


def chosen(x: Value, call: Call, written: Container[int]) -> Value:
    """What a call of CHOICES takes of x, its first argument; `written` are the storages that the
    graph writes to. Raises Opaque.
    """
    try:
        rest, named = map_aggregate(
            (call.args[1:], call.kwargs),
            lambda a: numbers_of(a, written) if isinstance(a, Slot) else a,
        )
        value = CHOICES[call.op](x, *rest, **named)
    except (*NOT_FORESEEN, RuntimeError) as error:
        raise Opaque(f"{call.op} was not read: {type(error).__name__}: {error}") from error
    if value.shape != call.outs[0].shape:
        raise Opaque(f"read with shape {value.shape} where the graph has {call.outs[0].shape}")
    return value


def numbers_of(slot: Slot, written: Container[int]) -> torch.Tensor:
    """An index tensor on the CPU, not expanded: the shape of the result tells whether that was
    meant. Raises Opaque.
    """
    while slot.call is not None and slot.call.op is aten.expand.default:
        slot = slot.call.args[0]
    found = _constant(slot, written)
    if found.dtype not in (torch.int32, torch.int64):
        raise Opaque("an index that is no integer")
    return found


def _constant(slot: Slot, written: Container[int]) -> torch.Tensor:
    call = slot.call
    if call is None or slot.storage in written:
        raise Opaque("an index whose numbers are not known")
    if call.op == "constant" and call.node.target is torch.tensor:
        told: torch.Tensor = torch.tensor(call.node.args[0], dtype=slot.dtype, device="cpu")
        return told
    if call.op not in SIMPLE:
        raise Opaque(f"an index by {call.op}")
    args = map_aggregate(call.args, lambda a: _constant(a, written) if isinstance(a, Slot) else a)
    kwargs = {name: a for name, a in call.kwargs.items() if name not in PLACES}
    with torch.device("cpu"):
        result = call.op(*args, **kwargs)
    assert isinstance(result, torch.Tensor)
    return result


def _index(x: Value, indices: Sequence[torch.Tensor | None]) -> Value:
    dims = [d for d, index in enumerate(indices) if index is not None]
    numbers = [index for index in indices if index is not None]
    if any(n.shape != numbers[0].shape or n.dim() != 1 for n in numbers):
        raise Opaque("elements chosen along several axes")
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    points = zip(*(n.tolist() for n in numbers), strict=True)
    return _at(x, dims, list(points), dims[0] if adjacent else 0)


def _index_select(x: Value, dim: int, index: torch.Tensor) -> Value:
    dim %= len(x.dims)
    return _at(x, [dim], [(i,) for i in index.tolist()], dim)


def _gather(x: Value, dim: int, index: torch.Tensor, *, sparse_grad: bool = False) -> Value:
    """Along one axis by a number for each place on the last, as long as both there."""
    dim, last = dim % len(x.dims), len(x.dims) - 1
    if dim == last or index.numel() != index.shape[-1] or index.numel() != x.shape[-1]:
        raise Opaque("elements gathered along several axes")
    points = [(n, i) for i, n in enumerate(index.flatten().tolist())]
    return shapes.unsqueeze(_at(x, [dim, last], points, last - 1), dim)


CHOICES: Mapping[Any, Callable[..., Value]] = {
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
}


def _at(x: Value, dims: Sequence[int], points: Sequence[tuple[int, ...]], place: int) -> Value:
    """x at some points of a few of its dims, which become one dim that stands at a place among the
    others.
    """
    for d in dims:
        x = flatten_explicit(x, d)
    atoms = [x.dims[d][0] for d in dims]
    others = tuple(a for a in x.explicit if a not in atoms)
    x = spread(x, (*others, *atoms))
    flat = [_row_major(point, [a.size for a in atoms]) for point in points]
    whole, new = count_of(atoms), Atom(len(points))
    positions = [row * whole + i for row in range(count_of(others)) for i in flat]
    x = take(x, positions, (*others, new))
    rest = [dim for d, dim in enumerate(x.dims) if d not in dims]
    rest.insert(place, (new,))
    return Value(tuple(rest), x.explicit, x.terms, x.dtype)


def _row_major(point: Sequence[int], sizes: Sequence[int]) -> int:
    """A point's place; negative coordinates count from the end."""
    at = 0
    for i, size in zip(point, sizes, strict=True):
        if not -size <= i < size:
            raise Opaque("an index outside its tensor")
        at = at * size + i % size
    return at
