"""Mutations that keep the meaning: other spellings of arithmetic, norms and tables.

Views and parts are in `keeping_views`; order, stores and casts in `keeping_order`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from tests.mutants.table import (
    mutation,
    need,
    op_of,
    proxies,
    proxy,
    shape,
)

instead = functools.partial(mutation, "instead", keeps=True)
behind = functools.partial(mutation, "behind", keeps=True)
around = functools.partial(mutation, "around", keeps=True)
P = fx.Proxy


# --- sums and products -------------------------------------------------------------------------


@instead("mul")
def swapped_factors(_: fx.Node, a: Any, b: Any) -> P:
    return b * a


@instead("add")
def swapped_terms(_: fx.Node, a: Any, b: Any) -> P:
    return b + a


@instead("mul")
def product_as_function(_: fx.Node, a: Any, b: Any) -> P:
    return torch.mul(a, b) if isinstance(a, P) else torch.mul(b, a)


@instead("mul")
def product_as_method(_: fx.Node, a: Any, b: Any) -> P:
    return a.mul(b) if isinstance(a, P) else b.multiply(a)


@instead("add")
def sum_as_function(_: fx.Node, a: Any, b: Any) -> P:
    return torch.add(a, b) if isinstance(a, P) else b.add(a)


@instead("add")
def sum_as_difference(_: fx.Node, a: Any, b: Any) -> P:
    return a - (-b)


@instead("sub")
def difference_as_sum(_: fx.Node, a: P, b: P) -> P:
    return a + (-b)


@instead("sub")
def difference_by_alpha(_: fx.Node, a: P, b: P) -> P:
    return torch.add(a, b, alpha=-1)


@instead("sub")
def difference_with_a_factor(_: fx.Node, a: P, b: P) -> P:
    return b * -1 + a


@instead("sub")
def negated_difference(_: fx.Node, a: P, b: P) -> P:
    return -(b - a)


@instead("neg")
def negation_as_product(_: fx.Node, a: P) -> P:
    return a * -1


@instead("neg")
def negation_as_difference(_: fx.Node, a: P) -> P:
    return 0 - a


@instead("mul")
def signs_that_cancel(_: fx.Node, a: Any, b: Any) -> P:
    return -((-a) * b)


@instead("add")
def halved_terms_doubled(_: fx.Node, a: Any, b: Any) -> P:
    return (a * 0.5 + b * 0.5) * 2


def _factors(x: Any) -> tuple[Any, Any]:
    """The operands of a product of tensors."""
    need(isinstance(x, P) and op_of(x.node) == "mul" and not x.node.kwargs)
    a, b = proxies(x.node.args)
    need(isinstance(a, P) and isinstance(b, P))
    return a, b


@instead("add")
def sum_as_addcmul(_: fx.Node, a: Any, b: Any) -> P:
    need(isinstance(a, P))
    return torch.addcmul(a, *_factors(b))


@instead("sub")
def difference_as_addcmul(_: fx.Node, a: P, b: P) -> P:
    return torch.addcmul(a, *_factors(b), value=-1)


@instead("mul")
def product_of_a_product_from_the_right(_: fx.Node, a: Any, b: Any) -> P:
    x, y = _factors(a)
    return x * (y * b)


@instead("mul")
def product_of_a_product_from_the_left(_: fx.Node, a: Any, b: Any) -> P:
    x, y = _factors(b)
    return (a * x) * y


@instead("mul")
def distributed_over_a_sum(_: fx.Node, a: Any, b: Any) -> P:
    sums = [x for x in (b, a) if isinstance(x, P) and op_of(x.node) in ("add", "sub")]
    need(sums)
    factor, (x, y) = a if sums[0] is b else b, proxies(sums[0].node.args)
    return factor * x + factor * y if op_of(sums[0].node) == "add" else factor * x - factor * y


@behind()
def doubled_and_halved(x: P) -> P:
    return x * 2 * 0.5


@behind()
def quartered_and_divided(x: P) -> P:
    return 0.25 * x / 0.25


@behind()
def times_one(x: P) -> P:
    return x * 1.0


@behind()
def plus_zero(x: P) -> P:
    return x + 0


@behind()
def negated_twice(x: P) -> P:
    return (-x).neg()


# --- norms -------------------------------------------------------------------------------------


@instead("rsqrt")
def rsqrt_as_inverse(_: fx.Node, v: P) -> P:
    return 1 / torch.sqrt(v)


@instead("rsqrt")
def rsqrt_as_power(_: fx.Node, v: P) -> P:
    return v**-0.5


@instead("rsqrt")
def rsqrt_as_reciprocal(_: fx.Node, v: P) -> P:
    return v.sqrt().reciprocal()


@instead("rsqrt")
def rsqrt_as_power_of_a_root(_: fx.Node, v: P) -> P:
    return v.pow(0.5).pow(-1)


@instead("pow")
def power_as_rsqrt(_: fx.Node, v: P, exponent: Any) -> P:
    need(exponent == -0.5)
    return torch.rsqrt(v)


@instead("sqrt")
def root_as_power(_: fx.Node, v: P) -> P:
    return torch.pow(v, 0.5)


@instead("div")
def quotient_as_product(_: fx.Node, a: Any, b: Any) -> P:
    return a * (1 / b) if isinstance(b, P) else a * (1.0 / b)


@instead("div")
def quotient_by_reciprocal(_: fx.Node, a: Any, b: Any) -> P:
    need(isinstance(b, P))
    return a * torch.reciprocal(b)


@instead("mul")
def product_with_rsqrt_as_quotient(_: fx.Node, a: Any, b: Any) -> P:
    x, root = (a, b) if isinstance(b, P) and op_of(b.node) == "rsqrt" else (b, a)
    need(isinstance(root, P) and op_of(root.node) == "rsqrt")
    return x / torch.sqrt(proxy(root.node.args[0]))


def _squared(node: fx.Node, *arguments: Any) -> P:
    """x of x * x, in any spelling."""
    x, *rest = arguments
    equal = op_of(node) == "mul" and len(set(node.args)) == 1
    two = len(rest) == 1 and not isinstance(rest[0], P) and rest[0] == 2
    need(isinstance(x, P) and (equal or op_of(node) == "square" or two))
    return x


@instead("pow", "square")
def square_as_product(node: fx.Node, *arguments: Any) -> P:
    x = _squared(node, *arguments)
    return x * x


@instead("pow", "mul")
def square_as_method(node: fx.Node, *arguments: Any) -> P:
    return _squared(node, *arguments).square()


@instead("square", "mul")
def square_as_power(node: fx.Node, *arguments: Any) -> P:
    return _squared(node, *arguments).pow(2)


@instead("pow", "square", "mul")
def square_as_operator(node: fx.Node, *arguments: Any) -> P:
    return _squared(node, *arguments) ** 2


@instead("pow", "square", "mul")
def square_as_float_power_function(node: fx.Node, *arguments: Any) -> P:
    return torch.pow(_squared(node, *arguments), 2.0)


def _mean(node: fx.Node) -> tuple[P, int, bool]:
    """What a mean over the last axis is of, how many it takes, and whether it keeps the axis."""
    x = proxy(node.args[0])
    kept = len(shape(node)) == len(shape(x))
    need(shape(node)[: len(shape(x)) - 1] == shape(x)[:-1])
    return x, shape(x)[-1], kept


@instead("mean")
def mean_as_sum_over_count(node: fx.Node, *_: Any, **__: Any) -> P:
    x, count, kept = _mean(node)
    return x.sum(-1, keepdim=kept) / count


@instead("mean")
def mean_as_sum_times_inverse(node: fx.Node, *_: Any, **__: Any) -> P:
    x, count, kept = _mean(node)
    return torch.sum(x, dim=-1, keepdim=kept) * (1.0 / count)


@instead("mean")
def mean_as_function(node: fx.Node, *_: Any, **__: Any) -> P:
    x, _, kept = _mean(node)
    return torch.mean(x, dim=(len(shape(x)) - 1,), keepdim=kept)


@instead("mean")
def mean_with_its_axis_put_back(node: fx.Node, *_: Any, **__: Any) -> P:
    x, _, kept = _mean(node)
    need(kept)
    return x.mean(-1)[..., None]


@instead("rms_norm")
def norm_spelled_out(_: fx.Node, x: P, width: Any, weight: Any = None, eps: Any = None) -> P:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


@instead("rms_norm")
def norm_with_its_weight_outside(
    _: fx.Node, x: P, width: Any, weight: Any = None, eps: Any = None
) -> P:
    return torch.rms_norm(x, width, None, eps) * weight


# --- tables ------------------------------------------------------------------------------------


@instead("cos")
def cosine_of_the_negated_angle(_: fx.Node, angle: P) -> P:
    return (-angle).cos()


@instead("sin")
def sine_turned_twice(_: fx.Node, angle: P) -> P:
    return -torch.sin(-angle)


@instead("polar")
def circle_as_complex(_: fx.Node, radius: P, angle: P) -> P:
    return torch.complex(angle.cos(), angle.sin())


@instead("polar")
def circle_conjugated_twice(_: fx.Node, radius: P, angle: P) -> P:
    return torch.polar(radius, -angle).conj()
