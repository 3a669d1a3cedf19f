"""Transfers of ops that move elements about: views, copies, casts, concatenation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fxfuse.patterns import arithmetic, shapes
from fxfuse.patterns.atoms import flatten_explicit
from fxfuse.patterns.transfer import Result, dim_of, is_exact_cast, transfer
from fxfuse.patterns.value import Kind, Opaque, Size, Value

aten = torch.ops.aten


@transfer("view", aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(result: Result, x: Value, size: Any) -> Value:
    return shapes.view(x, result.shape)


@transfer("view", aten.alias.default, aten.detach.default)
def _alias(result: Result, x: Value) -> Value:
    return x


@transfer("view", aten.permute.default)
def _permute(result: Result, x: Value, order: Sequence[int]) -> Value:
    return shapes.permute(x, [dim_of(x, d) for d in order])


@transfer("view", aten.transpose.int)
def _transpose(result: Result, x: Value, a: int, b: int) -> Value:
    order = list(range(len(x.dims)))
    a, b = dim_of(x, a), dim_of(x, b)
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
    return shapes.squeeze(x, [dim_of(x, d) for d in every])


@transfer("view", aten.expand.default)
def _expand(result: Result, x: Value, size: Any, *, implicit: bool = False) -> Value:
    return shapes.expand(x, result.shape)


@transfer("view", aten.slice.Tensor)
def _slice(
    result: Result, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    dim = dim_of(x, dim)
    size = x.shape[dim]
    start = 0 if start is None else start
    if isinstance(start, int) and start < 0:
        if not isinstance(size, int):
            raise Opaque("a slice from the end of a symbolic axis")
        start = max(start + size, 0)
    return shapes.narrow(x, dim, start, step, result.shape[dim])


@transfer("view", aten.select.int)
def _select(result: Result, x: Value, dim: int, index: Any) -> Value:
    dim = dim_of(x, dim)
    if isinstance(index, int) and index < 0:
        index = index + x.shape[dim]
    return shapes.squeeze(shapes.narrow(x, dim, index, 1, 1), [dim])


@transfer("view", aten.split.Tensor, aten.split_with_sizes.default)
def _split(result: Result, x: Value, size: Any, dim: int = 0) -> list[Value]:
    dim = dim_of(x, dim)
    parts, start = [], 0
    for shape in result.shapes:
        parts.append(shapes.narrow(x, dim, start, 1, shape[dim]))
        start = start + shape[dim]
    return parts


@transfer("view", aten.unbind.int)
def _unbind(result: Result, x: Value, dim: int = 0) -> list[Value]:
    dim = dim_of(x, dim)
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
    dim = dim_of(tensors[0], dim)
    if len(tensors) > 1 and any(_is_token_axis(x, dim) for x in tensors):
        raise Opaque("a cat of tokens")
    sources = [x.sources() for x in tensors]
    if any(sources) and not set.intersection(*sources):
        raise Opaque("a cat of different sources")
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


@transfer("compute", aten.slice_scatter.default)
def _slice_scatter(
    result: Result,
    x: Value,
    part: Value,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> Value:
    dim = dim_of(x, dim)
    if _is_token_axis(x, dim) or _is_token_axis(part, dim):
        raise Opaque("a write of tokens")
    size, start = x.shape[dim], start or 0
    return shapes.scatter(x, part, dim, start + size if start < 0 else start, step)


@transfer("compute", aten.select_scatter.default)
def _select_scatter(result: Result, x: Value, part: Value, dim: int, index: int) -> Value:
    dim = dim_of(x, dim)
    return _slice_scatter(result, x, shapes.unsqueeze(part, dim), dim, index)


@transfer("compute", aten.stack.default)
def _stack(result: Result, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = dim % (len(tensors[0].dims) + 1)
    return shapes.concatenate([shapes.unsqueeze(x, dim) for x in tensors], dim)


@transfer("compute", aten.flip.default)
def _flip(result: Result, x: Value, dims: Sequence[int]) -> Value:
    for dim in (dim_of(x, d) for d in dims):
        x = flatten_explicit(x, dim)
        size = x.shape[dim]
        x = shapes.narrow(x, dim, size - 1, -1, size)
    return x


@transfer("compute", aten.roll.default)
def _roll(result: Result, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    if len(shifts) != 1 or len(dims) != 1 or _is_token_axis(x, dim_of(x, dims[0])):
        raise Opaque("a roll of tokens")
    dim = dim_of(x, dims[0])
    x = flatten_explicit(x, dim)
    size = x.shape[dim]
    cut = (size - shifts[0]) % size
    if cut == 0:
        return x
    tail, head = shapes.narrow(x, dim, cut, 1, size - cut), shapes.narrow(x, dim, 0, 1, cut)
    return shapes.concatenate([tail, head], dim)
