"""Transfers of arithmetic, and of the row statistics that become leaves with definitions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxfuse.patterns import arithmetic, shapes
from fxfuse.patterns.transfer import Result, dim_of, transfer
from fxfuse.patterns.value import (
    STATISTICS,
    Definition,
    Index,
    Kind,
    Leaf,
    Opaque,
    Size,
    Value,
    leaf_value,
)

aten = torch.ops.aten


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
    for row, other in ((a, b), (b, a)):
        if _is_minus_mean(other, row):
            return _centred(result, row)
    mixed = _has_data(a) and _has_data(b) and not a.sources() & b.sources()
    if mixed and (a.sources() or b.sources()):
        raise Opaque("a sum of different sources")
    return arithmetic.add(a, b, result.dtype)


def _is_minus_mean(x: Value, row: Value) -> bool:
    """Whether x is minus the mean of a row's last axis, in the row's own places."""
    factors = x.terms[0].factors if len(x.terms) == 1 else ()
    definition = factors[0].leaf.definition if len(factors) == 1 else None
    if definition is None or definition.op != "mean" or set(x.terms[0].coefficients) != {-1.0}:
        return False
    (operand,), (dims, keepdim) = definition.operands, definition.params
    if operand.terms is not row.terms or operand.dims != row.dims or x.dims[-1:] != ((),):
        return False
    sizes, places = x.shape[:-1], [Index((0,), tuple((a, 1) for a in d)) for d in x.dims]
    return (
        dims == (len(row.dims) - 1,)
        and sizes == row.shape[:-1]
        and all(len(d) < 2 for d in x.dims)
        and factors[0].axes == tuple(places if keepdim else places[:-1])
    )


def _centred(result: Result, x: Value) -> Value:
    """x - mean(x) along the last axis, as a name: one source, whose rows a norm takes the mean
    off.
    """
    return result.name(Definition("centred", (x,)), x.shape)


def _has_data(x: Value) -> bool:
    return any(leaf.kind is Kind.DATA for leaf in x.leaves())


@transfer("compute", aten.sub.Tensor, aten.sub.Scalar)
def _sub(result: Result, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return _add(result, a, b, alpha=-alpha)


@transfer("compute", aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(result: Result, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return _add(result, b, a, alpha=-alpha)


@transfer("compute", aten.addcmul.default)
def _addcmul(result: Result, x: Value, a: Value, b: Value, *, value: Any = 1) -> Value:
    return _add(result, x, arithmetic.scaled(_mul(result, a, b), value))


@transfer("exact", aten.neg.default)
def _neg(result: Result, x: Value) -> Value:
    return arithmetic.scaled(x, -1, result.dtype)


@transfer("exact", aten._conj.default, aten.conj.default)
def _conj(result: Result, z: Value) -> Value:
    return arithmetic.mapped(z, lambda c: complex(c).conjugate(), result.dtype)


@transfer("compute", aten.sum.dim_IntList)
def _sum(
    result: Result, x: Value, dims: Sequence[int] | None, keepdim: bool = False, **kwargs: Any
) -> Value:
    if dims is None or len(dims) != 1 or not isinstance(n := x.shape[dim_of(x, dims[0])], int):
        raise Opaque("a sum over several axes")
    dim = dim_of(x, dims[0])
    if n > 4 and _is_square(x) and result.dtype.is_floating_point:
        mean = result.name(Definition("mean", (x,), ((dim,), keepdim)), result.shape)
        return arithmetic.scaled(mean, n, result.dtype)
    if n > 4 or x.dims[dim] == ():
        raise Opaque("a long sum")
    total = shapes.narrow(x, dim, 0, 1, 1)
    for i in range(1, n):
        total = _add(result, total, shapes.narrow(x, dim, i, 1, 1))
    return total if keepdim else shapes.squeeze(total, [dim])


def _is_square(x: Value) -> bool:
    """Whether x is one leaf times itself."""
    factors = x.terms[0].factors if len(x.terms) == 1 else ()
    return len(factors) == 2 and factors[0] == factors[1]


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
    """1 / x, named before what only repeats it."""
    read = {a for t in x.terms for f in t.factors for i in f.axes for a, _ in i.strides}
    dims = tuple(d if {*d} & {*read, *x.explicit} else () for d in x.dims)
    inner = dataclasses.replace(x, dims=dims)
    return shapes.expand(result.name(Definition("reciprocal", (inner,)), inner.shape), x.shape)


_POWERS = {-1: "reciprocal", -0.5: "rsqrt", 0.5: "sqrt"}


@transfer("compute", aten.pow.Tensor_Scalar)
def _pow(result: Result, x: Value, exponent: Any) -> Value:
    if exponent == 2:
        return _square(result, x)
    if exponent not in _POWERS:
        raise Opaque(f"a power of {exponent}")
    return result.name(Definition(_POWERS[exponent], (x,)))


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
    return result.name(Definition("mean", (x,), (tuple(dim_of(x, d) for d in every), keepdim)))


@transfer("compute", aten.linalg_vector_norm.default)
def _vector_norm(
    result: Result,
    x: Value,
    ord: Any = 2,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> Value:
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    if ord != 2 or len(dims) != 1 or not isinstance(x.shape[dims[0]], int):
        raise Opaque("another norm than a row's length")
    axis = dim_of(x, dims[0])
    mean = result.name(Definition("mean", (_square(result, x),), ((axis,), keepdim)), result.shape)
    return result.name(Definition("sqrt", (arithmetic.scaled(mean, x.shape[axis]),)))


@transfer("compute", aten.clamp_min.default)
def _clamp_min(result: Result, x: Value, low: Any) -> Value:
    if not _is_number(low):
        raise Opaque("a clamp at a number of the graph")
    return result.name(Definition("clamp_min", (x,), (float(low),)))


@transfer("compute", aten.clamp.default)
def _clamp(result: Result, x: Value, low: Any = None, high: Any = None) -> Value:
    if high is not None:
        raise Opaque("a clamp from above")
    return _clamp_min(result, x, low)


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
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    y = _over_root(result, _ungrouped(input), eps)
    return _weighted(result, y, weight)


@transfer("compute", aten.layer_norm.default)
def _layer_norm(
    result: Result,
    input: Value,
    normalized_shape: Sequence[Size],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: Any = 1e-5,
    cudnn_enable: bool = True,
) -> Value:
    if len(normalized_shape) != 1:
        raise Opaque("a norm over several axes")
    y = _over_root(result, _centred(result, _ungrouped(input)), eps)
    y = _weighted(result, y, weight)
    return y if bias is None else arithmetic.add(y, bias, result.dtype)


def _ungrouped(x: Value) -> Value:
    """x with an axis for each part of its row axes, so that a name of its rows can be followed."""
    rows = tuple((a,) for dim in x.dims[:-1] for a in dim)
    return dataclasses.replace(x, dims=(*rows, x.dims[-1]))


def _over_root(result: Result, x: Value, eps: Any) -> Value:
    """x * rsqrt(mean(x * x) + eps) along the last axis."""
    last, row = len(x.dims) - 1, (*x.shape[:-1], 1)
    mean = result.name(Definition("mean", (_square(result, x),), ((last,), True)), row)
    inverse = Definition("rsqrt", (arithmetic.add(mean, _operand(result, eps)),))
    rstd = result.name(inverse, row)
    return arithmetic.multiply(whole_row(x, rstd), rstd, result.dtype)


def _weighted(result: Result, y: Value, weight: Value | None) -> Value:
    """y with the shape it was asked for, times a weight."""
    y = y if y.shape == result.shape else shapes.view(y, result.shape)
    return y if weight is None else arithmetic.multiply(y, weight, result.dtype)


# How a leaf with a definition is computed from its operands.
DEFINITIONS: dict[str, Callable[..., torch.Tensor]] = {
    "sum": lambda x: x,
    "offset": torch.add,
    "rsqrt": torch.rsqrt,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "clamp_min": torch.clamp_min,
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "mean": lambda x, dims, keepdim: x.mean(dims, keepdim),
}
