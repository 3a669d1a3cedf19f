"""The transfer table: for each ATen op, what its result's Value is, given its operands' Values.

One entry an op. An entry says how its result relates to memory and to tables:

    view      the same elements seen through another index map; may share storage with its operand
    same      the same elements in memory of their own, or in another float dtype
    compute   arithmetic; on tables alone, or on weights alone, its result is a new leaf

A transfer gets a `Result` (the shape and dtype the op really gave, and a way to name a leaf) and
the op's arguments with tensors as Values. An op without an entry, and a transfer that raises
`Opaque`, give a fresh leaf.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from fxfuse.patterns import arithmetic, shapes
from fxfuse.patterns.atoms import flatten_explicit
from fxfuse.patterns.value import (
    STATISTICS,
    Definition,
    Kind,
    Leaf,
    Opaque,
    Size,
    Value,
    leaf_value,
)

aten = torch.ops.aten

Relation = Literal["view", "same", "compute"]


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
    def register(function: F) -> F:
        TRANSFERS.update({op: Transfer(relation, function) for op in ops})
        return function

    return register


def _dim(x: Value, dim: int) -> int:
    return dim % len(x.dims) if x.dims else 0


@transfer("view", aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(result: Result, x: Value, size: Any) -> Value:
    return shapes.view(x, result.shape)


@transfer("view", aten.alias.default, aten.detach.default)
def _alias(result: Result, x: Value) -> Value:
    return x


@transfer("view", aten.permute.default)
def _permute(result: Result, x: Value, order: Sequence[int]) -> Value:
    return shapes.permute(x, [_dim(x, d) for d in order])


@transfer("view", aten.transpose.int)
def _transpose(result: Result, x: Value, a: int, b: int) -> Value:
    order = list(range(len(x.dims)))
    a, b = _dim(x, a), _dim(x, b)
    order[a], order[b] = b, a
    return shapes.permute(x, order)


@transfer("view", aten.t.default, aten.numpy_T.default)
def _t(result: Result, x: Value) -> Value:
    return shapes.permute(x, range(len(x.dims))[::-1])


@transfer("view", aten.unsqueeze.default)
def _unsqueeze(result: Result, x: Value, dim: int) -> Value:
    return shapes.unsqueeze(x, dim % (len(x.dims) + 1))


@transfer("view", aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(result: Result, x: Value, dims: int | Sequence[int] | None = None) -> Value:
    every = range(len(x.dims)) if dims is None else [dims] if isinstance(dims, int) else dims
    return shapes.squeeze(x, [_dim(x, d) for d in every])


@transfer("view", aten.expand.default)
def _expand(result: Result, x: Value, size: Any, *, implicit: bool = False) -> Value:
    return shapes.expand(x, result.shape)


@transfer("view", aten.slice.Tensor)
def _slice(
    result: Result, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    dim = _dim(x, dim)
    size = x.shape[dim]
    start = 0 if start is None else start
    if isinstance(start, int) and start < 0:
        if not isinstance(size, int):
            raise Opaque("a slice from the end of a symbolic axis")
        start = max(start + size, 0)
    return shapes.narrow(x, dim, start, step, result.shape[dim])


@transfer("view", aten.select.int)
def _select(result: Result, x: Value, dim: int, index: Any) -> Value:
    dim = _dim(x, dim)
    if isinstance(index, int) and index < 0:
        index = index + x.shape[dim]
    return shapes.squeeze(shapes.narrow(x, dim, index, 1, 1), [dim])


@transfer("view", aten.split.Tensor, aten.split_with_sizes.default)
def _split(result: Result, x: Value, size: Any, dim: int = 0) -> list[Value]:
    dim = _dim(x, dim)
    parts, start = [], 0
    for shape in result.shapes:
        parts.append(shapes.narrow(x, dim, start, 1, shape[dim]))
        start = start + shape[dim]
    return parts


@transfer("view", aten.unbind.int)
def _unbind(result: Result, x: Value, dim: int = 0) -> list[Value]:
    dim = _dim(x, dim)
    return [shapes.squeeze(shapes.narrow(x, dim, i, 1, 1), [dim]) for i in range(x.shape[dim])]


@transfer("same", aten.view_as_complex.default)
def _view_as_complex(result: Result, x: Value) -> Value:
    last = len(x.dims) - 1
    real, imag = (shapes.squeeze(shapes.narrow(x, last, i, 1, 1), [last]) for i in (0, 1))
    return arithmetic.add(real, arithmetic.scaled(imag, 1j), result.dtype)


@transfer("same", aten.view_as_real.default)
def _view_as_real(result: Result, z: Value) -> Value:
    last = len(z.dims)
    parts = [
        shapes.unsqueeze(arithmetic.mapped(z, part, result.dtype), last)
        for part in (lambda c: complex(c).real, lambda c: complex(c).imag)
    ]
    return shapes.concatenate(parts, last)


@transfer("same", aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default)
def _clone(result: Result, x: Value, **kwargs: Any) -> Value:
    return x


@transfer("same", aten._to_copy.default)
def _to_copy(result: Result, x: Value, **kwargs: Any) -> Value:
    if is_exact_cast(x.dtype, result.dtype) or _is_float_cast(x.dtype, result.dtype):
        return dataclasses.replace(x, dtype=result.dtype)
    raise Opaque(f"a cast from {x.dtype} to {result.dtype}")


def _is_float_cast(old: torch.dtype, new: torch.dtype) -> bool:
    return old.is_floating_point and new.is_floating_point and new.itemsize > 1


def is_exact_cast(old: torch.dtype, new: torch.dtype) -> bool:
    """Every number of `old` is one of `new`, and both are of one sort."""
    if old == new:
        return True
    same_sort = old.is_floating_point == new.is_floating_point and old.is_complex == new.is_complex
    return same_sort and torch.promote_types(old, new) == new


@transfer("same", aten.repeat.default)
def _repeat(result: Result, x: Value, times: Sequence[Size]) -> Value:
    for _ in range(len(times) - len(x.dims)):
        x = shapes.unsqueeze(x, 0)
    for dim, count in enumerate(times):
        x = shapes.repeat(x, dim, count, inner=False)
    return x


@transfer("compute", aten.cat.default)
def _cat(result: Result, tensors: Sequence[Value], dim: int = 0) -> Value:
    tensors = [x for x in tensors if 0 not in x.shape]
    dim = _dim(tensors[0], dim)
    if len(tensors) > 1 and any(_is_token_axis(x, dim) for x in tensors):
        raise Opaque("a cat of tokens")
    return tensors[0] if len(tensors) == 1 else shapes.concatenate(tensors, dim)


def _is_token_axis(x: Value, dim: int) -> bool:
    """Whether dim runs along another axis than the last of some data leaf."""
    return any(
        index.stride(atom)
        for atom in x.dims[dim]
        for term in x.terms
        for factor in term.factors
        if factor.leaf.kind is Kind.DATA
        for index in factor.axes[:-1]
    )


@transfer("compute", aten.stack.default)
def _stack(result: Result, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % (len(tensors[0].dims) + 1)
    return shapes.concatenate([shapes.unsqueeze(x, dim) for x in tensors], dim)


@transfer("compute", aten.flip.default)
def _flip(result: Result, x: Value, dims: Sequence[int]) -> Value:
    for dim in (_dim(x, d) for d in dims):
        x = flatten_explicit(x, dim)
        size = x.shape[dim]
        x = shapes.narrow(x, dim, size - 1, -1, size)
    return x


@transfer("compute", aten.roll.default)
def _roll(result: Result, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    if len(shifts) != 1 or len(dims) != 1 or _is_token_axis(x, _dim(x, dims[0])):
        raise Opaque("a roll of tokens")
    dim = _dim(x, dims[0])
    x = flatten_explicit(x, dim)
    size = x.shape[dim]
    cut = (size - shifts[0]) % size
    if cut == 0:
        return x
    tail, head = shapes.narrow(x, dim, cut, 1, size - cut), shapes.narrow(x, dim, 0, 1, cut)
    return shapes.concatenate([tail, head], dim)


def _operand(result: Result, x: Any) -> Value:
    return x if isinstance(x, Value) else result.number(x)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, complex)) and not isinstance(x, bool)


@transfer("compute", aten.mul.Tensor, aten.mul.Scalar)
def _mul(result: Result, a: Any, b: Any) -> Value:
    if _is_number(a) or _is_number(b):
        x, number = (a, b) if _is_number(b) else (b, a)
        return arithmetic.scaled(x, number, result.dtype)
    a, b = _operand(result, a), _operand(result, b)
    if a is b or (a.terms is b.terms and a.dims == b.dims):
        return _square(result, a)
    return arithmetic.multiply(whole_row(a, b), whole_row(b, a), result.dtype)


@transfer("compute", aten.div.Tensor, aten.div.Scalar)
def _div(result: Result, a: Any, b: Any) -> Value:
    if _is_number(b):
        return arithmetic.scaled(a, 1 / b, result.dtype)
    a = _operand(result, a)
    return _mul(result, a, _inverse(result, _operand(result, b)))


@transfer("compute", aten.add.Tensor, aten.add.Scalar)
def _add(result: Result, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    a, b = _operand(result, a), _operand(result, b)
    if alpha != 1:
        b = arithmetic.scaled(b, alpha)
    if a.sources() and b.sources() and not a.sources() & b.sources():
        raise Opaque("a sum of different sources")
    return arithmetic.add(a, b, result.dtype)


@transfer("compute", aten.sub.Tensor, aten.sub.Scalar)
def _sub(result: Result, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return _add(result, a, b, alpha=-alpha)


@transfer("compute", aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(result: Result, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return _add(result, b, a, alpha=-alpha)


@transfer("compute", aten.addcmul.default)
def _addcmul(result: Result, x: Value, a: Value, b: Value, *, value: Any = 1) -> Value:
    return _add(result, x, arithmetic.scaled(_mul(result, a, b), value))


@transfer("compute", aten.neg.default)
def _neg(result: Result, x: Value) -> Value:
    return arithmetic.scaled(x, -1, result.dtype)


@transfer("compute", aten._conj.default, aten.conj.default)
def _conj(result: Result, z: Value) -> Value:
    return arithmetic.mapped(z, lambda c: complex(c).conjugate(), result.dtype)


@transfer("compute", aten.sum.dim_IntList)
def _sum(
    result: Result, x: Value, dims: Sequence[int] | None, keepdim: bool = False, **kwargs: Any
) -> Value:
    if dims is None or len(dims) != 1 or not isinstance(n := x.shape[_dim(x, dims[0])], int):
        raise Opaque("a sum over several axes")
    dim = _dim(x, dims[0])
    if n > 4 or x.dims[dim] == ():
        raise Opaque("a long sum")
    total = shapes.narrow(x, dim, 0, 1, 1)
    for i in range(1, n):
        total = _add(result, total, shapes.narrow(x, dim, i, 1, 1))
    return total if keepdim else shapes.squeeze(total, [dim])


def _square(result: Result, x: Value) -> Value:
    """x * x; a sum of terms gets a name first, so that the square keeps one term."""
    if len(x.terms) > 1:
        x = result.name(Definition("sum", (x,)))
    return arithmetic.multiply(x, x, result.dtype)


def whole_row(x: Value, statistic: Value) -> Value:
    """x, or the name of x under which `statistic` squared it."""
    if len(x.terms) < 2:
        return x
    for leaf in statistic.leaves():
        for named in _squared_sums(leaf):
            whole = named.definition.operands[0] if named.definition else None
            if whole is not None and whole.terms is x.terms and whole.dims == x.dims:
                return dataclasses.replace(leaf_value(named), dtype=x.dtype)
    return x


def _squared_sums(leaf: Leaf) -> list[Leaf]:
    """The named sums behind a statistic."""
    if leaf.definition is None:
        return []
    if leaf.definition.op == "sum":
        return [leaf]
    if leaf.definition.op not in STATISTICS:
        return []
    return [x for o in leaf.definition.operands for y in o.leaves() for x in _squared_sums(y)]


def _inverse(result: Result, x: Value) -> Value:
    return result.name(Definition("reciprocal", (x,)), x.shape)


@transfer("compute", aten.pow.Tensor_Scalar)
def _pow(result: Result, x: Value, exponent: Any) -> Value:
    if exponent == 2:
        return _square(result, x)
    if exponent == -0.5:
        return result.name(Definition("rsqrt", (x,)))
    if exponent == 0.5:
        return result.name(Definition("sqrt", (x,)))
    raise Opaque(f"a power of {exponent}")


@transfer("compute", aten.square.default)
def _square_op(result: Result, x: Value) -> Value:
    return _square(result, x)


@transfer("compute", aten.rsqrt.default)
def _rsqrt(result: Result, x: Value) -> Value:
    return result.name(Definition("rsqrt", (x,)))


@transfer("compute", aten.sqrt.default)
def _sqrt(result: Result, x: Value) -> Value:
    return result.name(Definition("sqrt", (x,)))


@transfer("compute", aten.reciprocal.default)
def _reciprocal(result: Result, x: Value) -> Value:
    return result.name(Definition("reciprocal", (x,)))


@transfer("compute", aten.mean.dim)
def _mean(
    result: Result, x: Value, dims: Sequence[int] | None, keepdim: bool = False, **kwargs: Any
) -> Value:
    every = dims or range(len(x.dims))
    return result.name(Definition("mean", (x,), (tuple(_dim(x, d) for d in every), keepdim)))


@transfer("compute", aten.rms_norm.default)
def _rms_norm(
    result: Result,
    input: Value,
    normalized_shape: Sequence[Size],
    weight: Value | None = None,
    eps: Any = None,
) -> Value:
    if len(normalized_shape) != 1:
        raise Opaque("a norm over several axes")
    eps = _operand(result, torch.finfo(input.dtype).eps if eps is None else eps)
    last, row = len(input.dims) - 1, (*result.shape[:-1], 1)
    mean = result.name(Definition("mean", (_square(result, input),), ((last,), True)), row)
    rstd = result.name(Definition("rsqrt", (arithmetic.add(mean, eps),)), row)
    y = arithmetic.multiply(whole_row(input, rstd), rstd, result.dtype)
    return y if weight is None else arithmetic.multiply(y, weight, result.dtype)


# How a leaf with a definition is computed from its operands.
DEFINITIONS: dict[str, Callable[..., torch.Tensor]] = {
    "sum": lambda x: x,
    "offset": torch.add,
    "rsqrt": torch.rsqrt,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "mean": lambda x, dims, keepdim: x.mean(dims, keepdim),
}
