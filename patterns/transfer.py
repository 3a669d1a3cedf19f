"""The transfer table: for each ATen op, what its result's Value is, given its operands' Values.

One entry an op. An entry says how its result relates to memory and to tables:

    view      the same elements seen through another index map; may share storage with its operand
    same      the same elements in memory of their own, or in another float dtype
    exact     arithmetic that rounds nothing; read through on tables and weights as well
    compute   arithmetic; on tables alone, or on weights alone, its result is a new leaf

A transfer gets a `Result` (the shape and dtype the op really gave, and a way to name a leaf) and
the op's arguments with tensors as Values. The entries stand in `transfer_shapes` and
`transfer_arithmetic`. An op without one, and a transfer that raises `Opaque`, give a fresh leaf.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from fxfuse.patterns.value import Opaque, Size, Value
from fxfuse.slots import Call

aten = torch.ops.aten

Relation = Literal["view", "same", "exact", "compute"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What the op really returned. `name(definition)` makes its result a leaf with that definition;
    `name(definition, shape)` a leaf that no node of the graph holds; `number` makes a Value of a
    scalar."""

    shape: tuple[Size, ...]
    dtype: torch.dtype
    shapes: tuple[tuple[Size, ...], ...]
    name: Callable[..., Value]
    number: Callable[[Any], Value]


Function: TypeAlias = Callable[..., Value | Sequence[Value]]
F = TypeVar("F", bound=Function)


@dataclasses.dataclass(frozen=True)
class Transfer:
    relation: Relation
    function: Function


TRANSFERS: dict[Any, Transfer] = {}


def transfer(relation: Relation, *ops: Any) -> Callable[[F], F]:
    """Enter a transfer function for some ops into the table."""

    def register(function: F) -> F:
        TRANSFERS.update({op: Transfer(relation, function) for op in ops})
        return function

    return register


# What a transfer raises on arguments that its author did not think of.
NOT_FORESEEN = (ValueError, IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError)


def transferred(
    call: Call,
    args: Any,
    kwargs: Any,
    name: Callable[..., Value],
    number: Callable[[Any], Value],
) -> list[Value]:
    """The Values of a call's results, given its arguments as Values. Raises Opaque."""
    out = call.outs[0]
    result = Result(
        out.shape,
        out.dtype,
        tuple(slot.shape for slot in call.outs),
        lambda definition, shape=None: name(out, definition, shape),
        number,
    )
    try:
        made = TRANSFERS[call.op].function(result, *args, **kwargs)
    except NOT_FORESEEN as error:
        raise Opaque(f"{call.op} was not read: {type(error).__name__}: {error}") from error
    values = [made] if isinstance(made, Value) else list(made)
    for x, slot in zip(values, call.outs, strict=True):
        if x.shape != slot.shape:
            raise Opaque(f"read with shape {x.shape} where the graph has {slot.shape}")
    return [dataclasses.replace(x, dtype=s.dtype) for x, s in zip(values, call.outs, strict=True)]


def dim_of(x: Value, dim: int) -> int:
    """A dim counted from the front."""
    return dim % len(x.dims) if x.dims else 0


def is_exact_cast(old: torch.dtype, new: torch.dtype) -> bool:
    """Every number of `old` is one of `new`, and both are of one sort."""
    if old == new:
        return True
    if 1 in (old.itemsize, new.itemsize):
        return False  # 8-bit formats promote to nothing
    same_sort = old.is_floating_point == new.is_floating_point and old.is_complex == new.is_complex
    return same_sort and torch.promote_types(old, new) == new
