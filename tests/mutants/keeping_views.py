"""Mutations that keep the meaning: other spellings of views, parts and joins."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from tests.mutants.table import dim_of, example, mutation, need, op_of, proxies, proxy, shape

instead = functools.partial(mutation, "instead", keeps=True)
behind = functools.partial(mutation, "behind", keeps=True)
P = fx.Proxy
RESHAPES = ("view", "reshape", "flatten", "unflatten")


def whole(*slices: Any) -> tuple[Any, ...]:
    return (Ellipsis, *slices)


# --- reshapes and transposes -------------------------------------------------------------------


@instead(*RESHAPES)
def reshape_by_sizes(node: fx.Node, x: P, *_: Any, **__: Any) -> P:
    return x.reshape(shape(node))


@instead(*RESHAPES)
def reshape_with_one_size_left_open(node: fx.Node, x: P, *_: Any, **__: Any) -> P:
    return torch.reshape(x, (-1, *shape(node)[1:]))


@instead("reshape", "flatten", "unflatten")
def reshape_as_view(node: fx.Node, x: P, *_: Any, **__: Any) -> P:
    return x.view(shape(node))


@instead("view", "reshape")
def reshape_as_unflatten(node: fx.Node, x: P, *_: Any) -> P:
    before, after = shape(x), shape(node)
    need(after[: len(before) - 1] == before[:-1] and len(after) > len(before))
    return x.unflatten(-1, after[len(before) - 1 :])


@instead("view", "reshape", "unflatten")
def reshape_through_one_axis(node: fx.Node, x: P, *_: Any, **__: Any) -> P:
    return x.flatten().view(shape(node))


@instead("transpose")
def transpose_as_permute(node: fx.Node, x: P, a: int, b: int) -> P:
    order = list(range(len(shape(node))))
    order[a], order[b] = order[b], order[a]
    return x.permute(order)


@instead("transpose")
def transpose_as_movedim(_: fx.Node, x: P, a: int, b: int) -> P:
    return torch.movedim(x, (a, b), (b, a))


@instead("transpose")
def transpose_as_swapaxes(_: fx.Node, x: P, a: int, b: int) -> P:
    return x.swapaxes(b, a)


@behind()
def transposed_twice(x: P) -> P:
    need(len(shape(x)) > 2)
    return x.transpose(1, 2).transpose(1, 2)


@behind()
def permuted_round(x: P) -> P:
    need(len(shape(x)) == 4)
    return x.permute(2, 0, 3, 1).permute(1, 3, 0, 2)


@behind()
def flattened_and_unflattened(x: P) -> P:
    need(len(shape(x)) > 2)
    return x.flatten(0, 1).unflatten(0, shape(x)[:2])


@behind()
def with_an_axis_of_one_and_without(x: P) -> P:
    return x.unsqueeze(1).squeeze(1)


@behind()
def with_two_axes_of_one_and_without(x: P) -> P:
    return x[None, ..., None].reshape(shape(x))


@behind()
def contiguous(x: P) -> P:
    return x.contiguous()


@behind()
def copied(x: P) -> P:
    return x.clone()


@behind()
def alias(x: P) -> P:
    return torch.ops.aten.alias.default(x)


@behind()
def viewed_as_it_is(x: P) -> P:
    return x.view_as(x)


@behind()
def detached(x: P) -> P:
    return x.detach()


@behind()
def sliced_whole(x: P) -> P:
    return x[whole(slice(None))]


@behind()
def flipped_twice(x: P) -> P:
    return x.flip(-1).flip(-1)


@behind()
def rolled_there_and_back(x: P) -> P:
    return torch.roll(torch.roll(x, 1, -1), -1, -1)


@behind()
def repeated_once(x: P) -> P:
    return x.repeat(*[1] * len(shape(x)))


@behind()
def cut_and_joined(x: P) -> P:
    half = shape(x)[-1] // 2
    need(half)
    return torch.cat([x[whole(slice(None, half))], x[whole(slice(half, None))]], -1)


@behind()
def cut_and_joined_by_heads(x: P) -> P:
    need(len(shape(x)) == 4 and shape(x)[1] > 1)
    return torch.cat([x[:, :1], x[:, 1:]], 1)


@behind()
def cut_and_joined_by_batch_rows(x: P) -> P:
    need(len(shape(x)) == 4 and shape(x)[0] > 1)
    return torch.cat([x[:1], x[1:]], dim=0)


# --- axes of one and expansion -----------------------------------------------------------------


@instead("unsqueeze")
def unsqueeze_as_index(node: fx.Node, x: P, dim: int) -> P:
    dim %= len(shape(node))
    return x[(*[slice(None)] * dim, None)]


@instead("unsqueeze")
def unsqueeze_as_reshape(node: fx.Node, x: P, *_: Any) -> P:
    return x.reshape(shape(node))


def _small(node: fx.Node, a: Any, b: Any) -> tuple[P, P]:
    """A product's operand that is broadcast, and the other."""
    for x, y in ((a, b), (b, a)):
        if isinstance(x, P) and isinstance(y, P) and shape(x) != shape(node) == shape(y):
            return x, y
    need(False)
    raise AssertionError


@instead("mul")
def expanded_operand(node: fx.Node, a: Any, b: Any) -> P:
    small, large = _small(node, a, b)
    return large * small.expand(shape(node))


@instead("mul")
def expanded_as_the_other(node: fx.Node, a: Any, b: Any) -> P:
    small, large = _small(node, a, b)
    return small.expand_as(large) * large


@instead("mul")
def broadcast_operand(node: fx.Node, a: Any, b: Any) -> P:
    small, large = _small(node, a, b)
    return torch.broadcast_to(small, shape(node)) * large


@instead("mul")
def operand_with_leading_axes(node: fx.Node, a: Any, b: Any) -> P:
    small, large = _small(node, a, b)
    missing = len(shape(node)) - len(shape(small))
    need(missing)
    return large * small[(*[None] * missing, Ellipsis)]


# --- parts: of chunk, split and unbind ---------------------------------------------------------


def _cut(node: fx.Node, number: int) -> tuple[P, int, int, int]:
    """x, the dim, the start and the length of part `number` of x.chunk or x.split."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    need(op_of(source) in ("chunk", "split"))
    x = proxy(source.args[0])
    parts = [tuple(t.shape) for t in example(source)]
    dim = source.kwargs.get("dim", source.args[2] if len(source.args) > 2 else 0)
    assert isinstance(dim, int)
    dim %= len(parts[0])
    return x, dim, sum(p[dim] for p in parts[:number]), parts[number][dim]


@instead("part")
def part_as_slice(node: fx.Node, _: Any, number: int) -> P:
    x, dim, start, length = _cut(node, number)
    return x[(*[slice(None)] * dim, slice(start, start + length))]


@instead("part")
def part_as_narrow(node: fx.Node, _: Any, number: int) -> P:
    return torch.narrow(*_cut(node, number))


@instead("part")
def part_of_sizes(node: fx.Node, _: Any, number: int) -> P:
    x, dim, start, length = _cut(node, number)
    return x.split([start, length, shape(x)[dim] - start - length], dim)[1]


@instead("part")
def part_of_tensor_split(node: fx.Node, _: Any, number: int) -> P:
    x, dim, start, length = _cut(node, number)
    return torch.tensor_split(x, (start, start + length), dim)[1]


@instead("part")
def part_of_unflattened(node: fx.Node, _: Any, number: int) -> P:
    x, dim, start, length = _cut(node, number)
    need(start % length == 0 and shape(x)[dim] % length == 0)
    return x.unflatten(dim, (-1, length)).select(dim, start // length)


@instead("part")
def part_by_index(node: fx.Node, _: Any, number: int) -> P:
    x, dim, start, length = _cut(node, number)
    channels = node.graph.call_function(torch.arange, (start, start + length))
    return x.index_select(dim, proxy(channels))


@instead("part")
def member_of_unbind_as_select(node: fx.Node, _: Any, number: int) -> P:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    need(op_of(source) == "unbind")
    x, *dim = proxies(source.args)
    return x.select(dim[0] if dim else source.kwargs.get("dim", 0), number)


# --- slices: of the last axis ------------------------------------------------------------------


def _slice(node: fx.Node, x: P, index: Any) -> tuple[int, int, int]:
    """Start, stop and step of x[..., a:b:c]."""
    need(isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis)
    need(isinstance(index[1], slice) and shape(node)[-1])
    return index[1].indices(shape(x)[-1])


@instead("index")
def slice_as_narrow(node: fx.Node, x: P, index: Any) -> P:
    start, stop, step = _slice(node, x, index)
    need(step == 1)
    return x.narrow(-1, start, stop - start)


@instead("index")
def slice_with_every_bound(node: fx.Node, x: P, index: Any) -> P:
    start, stop, step = _slice(node, x, index)
    return x[(*[slice(None)] * (len(shape(x)) - 1), slice(start, stop, step))]


@instead("index")
def slice_from_the_end(node: fx.Node, x: P, index: Any) -> P:
    start, stop, step = _slice(node, x, index)
    width = shape(x)[-1]
    return x[whole(slice(start - width, stop - width or None, step))]


@instead("index")
def slice_of_split(node: fx.Node, x: P, index: Any) -> P:
    start, stop, step = _slice(node, x, index)
    need(step == 1)
    return torch.split(x, [start, stop - start, shape(x)[-1] - stop], -1)[1]


@instead("index")
def every_second_of_pairs(node: fx.Node, x: P, index: Any) -> P:
    start, _, step = _slice(node, x, index)
    need(step == 2)
    return x.unflatten(-1, (-1, 2))[whole(start)]


@instead("index")
def every_second_unbound(node: fx.Node, x: P, index: Any) -> P:
    start, _, step = _slice(node, x, index)
    need(step == 2)
    return x.reshape(*shape(x)[:-1], -1, 2).unbind(-1)[start]


@instead("narrow")
def narrow_as_slice(_: fx.Node, x: P, __: int, start: int, length: int) -> P:
    return x[whole(slice(start, start + length))]


# --- joins -------------------------------------------------------------------------------------


@instead("cat")
def cat_along_an_axis_from_the_front(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    return torch.concatenate(tuple(parts), dim_of(node))


@instead("cat")
def cat_in_another_order(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    first, dim = shape(parts[0]), dim_of(node)
    need(len(parts) == 2)
    joined = torch.cat([parts[1], parts[0]], dim)
    rest = shape(node)[dim] - first[dim]
    return torch.cat([joined.narrow(dim, rest, first[dim]), joined.narrow(dim, 0, rest)], dim)


@instead("cat")
def cat_rolled(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    dim = dim_of(node)
    return torch.roll(torch.cat([*parts[1:], parts[0]], dim), shape(parts[0])[dim], dim)


@instead("cat")
def cat_as_flattened_stack(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    need(len({shape(p) for p in parts}) == 1)
    dim = dim_of(node)
    return torch.stack(list(parts), dim).flatten(dim, dim + 1)


@instead("cat")
def cat_with_its_sign_outside(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    return -torch.cat([-p for p in parts], dim_of(node))


@instead("stack")
def stack_as_cat(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    dim = dim_of(node)
    return torch.cat([p.unsqueeze(dim) for p in parts], dim)


@instead("stack")
def stack_along_the_front(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    return torch.stack(list(parts)).movedim(0, dim_of(node))


@instead("repeat_interleave")
def repeated_by_stack(_: fx.Node, x: P, *__: Any, **___: Any) -> P:
    return torch.stack([x, x], -1).flatten(-2)


@instead("repeat_interleave")
def repeated_by_expand(node: fx.Node, x: P, *_: Any, **__: Any) -> P:
    return x[..., None].expand(*shape(x), 2).reshape(shape(node))


@instead("roll")
def roll_as_cat(_: fx.Node, x: P, by: int, dim: int) -> P:
    width = shape(x)[dim]
    return torch.cat([x.narrow(dim, width - by, by), x.narrow(dim, 0, width - by)], dim)


@instead("flip")
def flip_as_cat(_: fx.Node, x: P, dims: Any) -> P:
    dim = dims if isinstance(dims, int) else dims[0]
    return torch.cat([x.narrow(dim, i, 1) for i in reversed(range(shape(x)[dim]))], dim)
