"""Near misses of place: other channels, rows, slices, parts and joins.

Some keep the results where they happen to fit (a table's equal halves swapped): the harness tells.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from tests.mutants.table import dim_of, example, mutation, need, op_of, shape

instead = functools.partial(mutation, "instead", keeps=False)
behind = functools.partial(mutation, "behind", keeps=False)
P = fx.Proxy


# --- other channels, rows and tables -----------------------------------------------------------


@behind()
def channels_rolled_by_one(x: P) -> P:
    return torch.roll(x, 1, -1)


@behind()
def halves_swapped(x: P) -> P:
    return torch.roll(x, shape(x)[-1] // 2, -1)


@behind()
def channels_flipped(x: P) -> P:
    return x.flip(-1)


@behind()
def rows_rolled_by_one(x: P) -> P:
    need(len(shape(x)) > 1)
    return x.roll(1, -2)


@behind()
def first_row_for_all(x: P) -> P:
    need(len(shape(x)) > 1)
    return x[..., :1, :].expand(shape(x))


@behind()
def first_head_for_all(x: P) -> P:
    need(len(shape(x)) == 4)
    return x[:, :1].expand(shape(x))


@behind()
def heads_rolled_by_one(x: P) -> P:
    need(len(shape(x)) == 4)
    return x.roll(1, 1)


@behind()
def batch_flipped(x: P) -> P:
    return x.flip(0)


@behind()
def heads_and_tokens_mixed_up(x: P) -> P:
    need(len(shape(x)) == 4)
    b, h, t, d = shape(x)
    return x.reshape(b, t, h, d).transpose(1, 2)


@behind()
def square_axes_transposed(x: P) -> P:
    need(len(shape(x)) == 4 and shape(x)[1] == shape(x)[2])
    return x.transpose(1, 2)


@behind()
def second_half_as_the_first(x: P) -> P:
    half = shape(x)[-1] // 2
    need(half and shape(x)[-1] % 2 == 0)
    return torch.cat([x[..., half:], x[..., half:]], -1)


@behind()
def one_channel_scaled(x: P) -> P:
    need(shape(x)[-1] > 1)
    return torch.cat([x[..., :1] * 2, x[..., 1:]], -1)


@behind()
def last_channel_from_the_first(x: P) -> P:
    need(shape(x)[-1] > 1)
    return torch.cat([x[..., :-1], x[..., :1]], -1)


@behind()
def interleaved_for_halved(x: P) -> P:
    need(shape(x)[-1] % 2 == 0)
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


# --- slices, parts and joins -------------------------------------------------------------------


def _bounds(node: fx.Node, x: P, index: Any) -> tuple[int, int, int]:
    need(isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis)
    need(isinstance(index[1], slice) and shape(node)[-1])
    return index[1].indices(shape(x)[-1])


@instead("index")
def slice_from_one_earlier(node: fx.Node, x: P, index: Any) -> P:
    start, stop, step = _bounds(node, x, index)
    need(start)
    return x[..., start - 1 : max(stop - 1, start) : step]


@instead("index")
def slice_from_one_later(node: fx.Node, x: P, index: Any) -> P:
    start, stop, step = _bounds(node, x, index)
    return x[..., start + 1 : stop + 1 : step]


@instead("index")
def slice_of_the_other_end(node: fx.Node, x: P, index: Any) -> P:
    start, stop, step = _bounds(node, x, index)
    width = shape(x)[-1]
    need(step == 1)
    return x[..., width - stop : width - start]


@instead("index")
def slice_with_another_step(node: fx.Node, x: P, index: Any) -> P:
    _, _, step = _bounds(node, x, index)
    count = shape(node)[-1]
    return x[..., :count] if step > 1 else x[..., ::2][..., :count]


@instead("part")
def another_part(node: fx.Node, parts: P, number: int) -> P:
    options = example(parts.node)
    same = [i for i, t in enumerate(options) if i != number and t.shape == options[number].shape]
    need(same)
    return parts[same[0]]


@instead("cat", "stack")
def parts_in_another_order(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    return getattr(torch, op_of(node))(list(parts)[::-1], dim=dim_of(node))


@instead("cat", "stack")
def first_part_twice(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    return getattr(torch, op_of(node))([parts[0], parts[0], *parts[2:]], dim=dim_of(node))


@instead("cat", "stack")
def last_part_zero(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    *rest, last = parts
    return getattr(torch, op_of(node))([*rest, torch.zeros_like(last)], dim=dim_of(node))


@instead("cat")
def last_part_dropped(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    return torch.cat(list(parts)[:-1], dim=dim_of(node))


@instead("stack")
def stacked_the_other_way(node: fx.Node, parts: Any, *_: Any, **__: Any) -> P:
    joined = torch.cat(list(parts), -1)
    return joined.reshape(shape(node))


@instead("repeat_interleave")
def tiled_for_repeated(node: fx.Node, x: P, *_: Any, **__: Any) -> P:
    return torch.cat([x, x], -1)


@instead("roll")
def rolled_further(_: fx.Node, x: P, by: int, dim: int) -> P:
    return x.roll(by - 1, dim)
