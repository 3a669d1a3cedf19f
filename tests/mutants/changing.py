"""Near misses: mutations that change what is computed, in signs, terms, operands and norms.

Those of channels and rows are in `changing_channels`, those of memory in `changing_memory`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from tests.mutants.table import (
    example,
    is_float,
    mutation,
    need,
    op_of,
    proxies,
    proxy,
    shape,
    writes,
)

instead = functools.partial(mutation, "instead", keeps=False)
behind = functools.partial(mutation, "behind", keeps=False)
around = functools.partial(mutation, "around", keeps=False)
P = fx.Proxy


# --- signs and terms ---------------------------------------------------------------------------


@instead("neg")
def negation_dropped(_: fx.Node, a: P) -> P:
    return a * 1


@behind()
def negated(x: P) -> P:
    return -x


@instead("add")
def sum_turned_difference(_: fx.Node, a: Any, b: Any) -> P:
    return a - b


@instead("add")
def difference_the_other_way(_: fx.Node, a: Any, b: Any) -> P:
    return b - a


@instead("sub")
def difference_turned_sum(_: fx.Node, a: P, b: P) -> P:
    return a + b


@instead("sub")
def operands_of_a_difference_swapped(_: fx.Node, a: P, b: P) -> P:
    return b - a


@instead("div")
def operands_of_a_quotient_swapped(_: fx.Node, a: Any, b: Any) -> P:
    return b / a


@instead("add")
def first_term_doubled(_: fx.Node, a: Any, b: Any) -> P:
    return a * 2 + b


@instead("add")
def second_term_weighed(_: fx.Node, a: Any, b: Any) -> P:
    return torch.add(a, b, alpha=0.75) if isinstance(a, P) and isinstance(b, P) else b * 0.75 + a


@instead("add", "sub")
def second_term_dropped(_: fx.Node, a: Any, b: Any) -> P:
    return (a if isinstance(a, P) else b).clone()


@instead("mul")
def factor_dropped(node: fx.Node, a: Any, b: Any) -> P:
    kept = [x for x in (a, b) if isinstance(x, P) and shape(x) == shape(node)]
    need(kept)
    return kept[0].clone()


@instead("mul")
def product_turned_sum(_: fx.Node, a: Any, b: Any) -> P:
    return a + b


@instead("mul")
def factor_squared(_: fx.Node, a: Any, b: Any) -> P:
    return a * b * b


@instead("mul", "add")
def another_number(node: fx.Node, a: Any, b: Any) -> P:
    need(not isinstance(a, P) or not isinstance(b, P))
    a, b = (x if isinstance(x, P) else x * 1.5 for x in (a, b))
    return a * b if op_of(node) == "mul" else a + b


# --- other operands ----------------------------------------------------------------------------


def _others(node: fx.Node, old: fx.Node) -> list[fx.Node]:
    """What an operand may be taken for: earlier tensors of its shape, the nearest first."""
    found, wanted = [], (example(old).shape, example(old).dtype)
    for other in node.graph.nodes:
        if other is node:
            break
        t = example(other)
        same = isinstance(t, Tensor) and (t.shape, t.dtype) == wanted
        if same and other is not old and not writes(other):
            found.append(other)
    return found[::-1]


def _swap_operand(node: fx.Node, place: int, number: int) -> None:
    operands = [n for n in node.all_input_nodes if is_float(n)]
    need(len(operands) > place)
    others = _others(node, operands[place])
    need(len(others) > number)
    node.replace_input_with(operands[place], others[number])


@around()
def nearest_other_first_operand(node: fx.Node) -> None:
    _swap_operand(node, 0, 0)


@around()
def nearest_other_second_operand(node: fx.Node) -> None:
    _swap_operand(node, 1, 0)


@around()
def third_other_first_operand(node: fx.Node) -> None:
    _swap_operand(node, 0, 2)


@around()
def third_other_second_operand(node: fx.Node) -> None:
    _swap_operand(node, 1, 2)


@around("mul", "addcmul")
def sine_for_cosine(node: fx.Node) -> None:
    """Or cosine for sine, in this one term."""
    for operand in node.all_input_nodes:
        if others := [n for n in _others(node, operand) if _is_other_table(n, operand)]:
            node.replace_input_with(operand, others[0])
            return
    need(False)


def _is_other_table(other: fx.Node, table: fx.Node) -> bool:
    return {_table_of(other), _table_of(table)} == {"cos", "sin"}


def _table_of(node: fx.Node) -> str:
    """cos or sin, seen through calls with one operand."""
    while op_of(node) not in ("cos", "sin") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return op_of(node)


# --- norms -------------------------------------------------------------------------------------


def _reduced(node: fx.Node) -> tuple[P, bool]:
    x = proxy(node.args[0])
    return x, len(shape(node)) == len(shape(x))


@instead("mean")
def mean_turned_sum(node: fx.Node, *_: Any, **__: Any) -> P:
    x, kept = _reduced(node)
    return x.sum(-1, keepdim=kept)


@instead("mean")
def mean_over_the_axis_before(node: fx.Node, *_: Any, **__: Any) -> P:
    x, kept = _reduced(node)
    need(kept)
    return x.mean(-2, keepdim=True)


@instead("mean")
def mean_over_two_axes(node: fx.Node, *_: Any, **__: Any) -> P:
    x, kept = _reduced(node)
    need(kept)
    return x.mean((-1, -2), keepdim=True)


@instead("mean")
def largest_for_mean(node: fx.Node, *_: Any, **__: Any) -> P:
    x, kept = _reduced(node)
    return x.amax(-1, keepdim=kept)


@instead("mean")
def mean_of_the_first_half(node: fx.Node, *_: Any, **__: Any) -> P:
    x, kept = _reduced(node)
    return x[..., : shape(x)[-1] // 2].mean(-1, keepdim=kept)


@instead("mean")
def mean_off_by_one(node: fx.Node, *_: Any, **__: Any) -> P:
    x, kept = _reduced(node)
    return x.sum(-1, keepdim=kept) / (shape(x)[-1] - 1)


def _mean_and_eps(v: P) -> tuple[P, Any]:
    need(op_of(v.node) == "add")
    a, b = proxies(v.node.args)
    return (a, b) if isinstance(a, P) else (b, a)


@instead("rsqrt", "sqrt")
def eps_outside_the_root(node: fx.Node, v: P) -> P:
    mean, eps = _mean_and_eps(v)
    return getattr(torch, op_of(node))(mean) + eps


@instead("rsqrt", "sqrt")
def eps_dropped(node: fx.Node, v: P) -> P:
    return getattr(torch, op_of(node))(_mean_and_eps(v)[0])


@instead("add")
def largest_of_mean_and_eps(_: fx.Node, a: Any, b: Any) -> P:
    need(not isinstance(a, P) or not isinstance(b, P))
    return torch.clamp_min(a, b) if isinstance(a, P) else b.clamp_min(a)


@instead("pow", "square", "mul")
def square_as_eps_inside(node: fx.Node, a: Any, *rest: Any) -> P:
    need(op_of(node) != "mul" or node.args[0] is node.args[1])
    return (a + 0.1) * (a + 0.1)


@instead("pow", "square")
def cubed(_: fx.Node, x: P, *__: Any) -> P:
    return x.pow(3)


@instead("pow", "square")
def magnitude_for_square(_: fx.Node, x: P, *__: Any) -> P:
    return x.abs()


@instead("rsqrt")
def reciprocal_for_rsqrt(_: fx.Node, v: P) -> P:
    return 1 / v


@instead("rsqrt")
def root_for_rsqrt(_: fx.Node, v: P) -> P:
    return v.sqrt()


@instead("rsqrt")
def rsqrt_twice(_: fx.Node, v: P) -> P:
    return v.rsqrt().rsqrt()


@instead("rsqrt", "pow")
def another_power(_: fx.Node, v: P, *__: Any) -> P:
    return v.pow(-0.25)


@instead("rms_norm")
def norm_with_another_eps(_: fx.Node, x: P, width: Any, weight: Any = None, eps: Any = 0) -> P:
    return torch.rms_norm(x, width, weight, eps * 3)


@instead("rms_norm")
def norm_of_all_heads(_: fx.Node, x: P, width: Any, weight: Any = None, eps: Any = 0) -> P:
    need(len(shape(x)) == 4)
    return torch.rms_norm(x, shape(x)[1:], None, eps) * weight


@instead("rms_norm")
def layer_norm_for_rms_norm(_: fx.Node, x: P, width: Any, weight: Any = None, eps: Any = 0) -> P:
    return torch.nn.functional.layer_norm(x, width, weight, None, eps)
