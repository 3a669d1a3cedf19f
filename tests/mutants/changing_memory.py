"""Near misses of memory, precision and data: writes in place, other slots, rounding, gates."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx

from tests.mutants.table import example, followers, mutation, need, op_of, proxy, shape, writes

instead = functools.partial(mutation, "instead", keeps=False)
behind = functools.partial(mutation, "behind", keeps=False)
around = functools.partial(mutation, "around", keeps=False)
P = fx.Proxy
STORES = ("index_copy_", "setitem", "index_put_")


# --- writes in place, seen by some readers -----------------------------------------------------


def _write(node: fx.Node, write: Callable[[P], object], before: fx.Node) -> None:
    """A write into a node's memory whose result nobody reads."""
    with node.graph.inserting_before(before):
        write(proxy(node))


def _last_reader(node: fx.Node) -> fx.Node:
    readers = [n for n in followers(node) if n in node.users]
    need(readers)
    return readers[-1]


@around()
def scaled_in_place(node: fx.Node) -> None:
    _write(node, lambda x: x.mul_(1.5), node.next)


@around()
def scaled_in_place_before_its_last_reader(node: fx.Node) -> None:
    _write(node, lambda x: x.mul_(1.5), _last_reader(node))


@around()
def moved_in_place_behind_its_last_reader(node: fx.Node) -> None:
    _write(node, lambda x: x.add_(0.5), _last_reader(node).next)


@around()
def negated_in_place_before_its_last_reader(node: fx.Node) -> None:
    _write(node, lambda x: x.neg_(), _last_reader(node))


@around()
def first_channel_zeroed_in_place(node: fx.Node) -> None:
    _write(node, lambda x: x[..., :1].zero_(), _last_reader(node))


@around()
def first_head_scaled_through_a_view(node: fx.Node) -> None:
    need(len(shape(node)) == 4)
    _write(node, lambda x: x.transpose(1, 2)[:, :, 0].mul_(-2), _last_reader(node))


@around()
def overwritten_by_its_flip(node: fx.Node) -> None:
    _write(node, lambda x: x.copy_(x.flip(-1)), _last_reader(node))


@around()
def operand_scaled_in_place_before(node: fx.Node) -> None:
    operands = [n for n in node.all_input_nodes if isinstance(example(n), Tensor)]
    operands = [n for n in operands if example(n).is_floating_point() and n.op != "placeholder"]
    need(operands)
    _write(operands[0], lambda x: x.mul_(1.5), node)


# --- stores ------------------------------------------------------------------------------------


def _rows_place(node: fx.Node) -> int:
    return 3 if op_of(node) == "index_copy_" else 2


def _slots_of(node: fx.Node) -> fx.Node:
    return next(n for n in node.all_input_nodes if not example(n).is_floating_point())


@around(*STORES)
def slots_moved_by_one(node: fx.Node) -> None:
    slots = _slots_of(node)
    with node.graph.inserting_before(node):
        node.replace_input_with(slots, (proxy(slots) + 1).node)


@around(*STORES)
def slots_reversed(node: fx.Node) -> None:
    slots = _slots_of(node)
    with node.graph.inserting_before(node):
        node.replace_input_with(slots, proxy(slots).flip(0).node)


@around(*STORES)
def slots_the_same_for_all(node: fx.Node) -> None:
    slots = _slots_of(node)
    with node.graph.inserting_before(node):
        node.replace_input_with(slots, (proxy(slots) * 0 + 2).node)


@around(*STORES)
def slots_of_both_caches_moved_in_place(node: fx.Node) -> None:
    _write(_slots_of(node), lambda slots: slots.add_(1), node)


@around(*STORES)
def rows_scaled_before_the_store(node: fx.Node) -> None:
    rows = node.args[_rows_place(node)]
    assert isinstance(rows, fx.Node)
    with node.graph.inserting_before(node):
        node.replace_input_with(rows, (proxy(rows) * 2).node)


@around(*STORES)
def store_of_earlier_rows(node: fx.Node) -> None:
    """Of the unrotated or unnormed k, or of v."""
    rows = node.args[_rows_place(node)]
    assert isinstance(rows, fx.Node)
    kin = [n for n in node.graph.nodes if n is not rows and _alike(n, rows)]
    early = [n for n in kin if n < node and not writes(n)]
    need(early)
    node.replace_input_with(rows, early[0])


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = example(a), example(b)
    return isinstance(x, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)


@around(*STORES)
def caches_swapped(node: fx.Node) -> None:
    cache = node.args[0]
    assert isinstance(cache, fx.Node)
    others = [n for n in node.graph.nodes if n.op == "placeholder" and _alike(n, cache)]
    other = next(n for n in others if n is not cache)
    node.replace_input_with(cache, other)


@around(*STORES)
def store_behind_attention(node: fx.Node) -> None:
    attention = next(n for n in followers(node) if op_of(n) == "scaled_dot_product_attention")
    attention.append(node)


@around(*STORES)
def cache_read_before_the_store(node: fx.Node) -> None:
    cache = node.args[0]
    assert isinstance(cache, fx.Node)
    readers = [n for n in followers(node) if cache in n.all_input_nodes and not writes(n)]
    need(readers)
    with node.graph.inserting_before(node):
        old = proxy(cache).clone().node
    for reader in readers:
        reader.replace_input_with(cache, old)


@around(*STORES)
def cache_scaled_behind_the_store(node: fx.Node) -> None:
    cache = node.args[0]
    assert isinstance(cache, fx.Node)
    _write(cache, lambda x: x.mul_(0.5), node.next)


@around(*STORES)
def cache_filled_before_the_store(node: fx.Node) -> None:
    cache = node.args[0]
    assert isinstance(cache, fx.Node)
    _write(cache, lambda x: x.fill_(0.25), node)


@around(*STORES)
def cache_feeds_back_into_its_rows(node: fx.Node) -> None:
    cache, rows = node.args[0], node.args[_rows_place(node)]
    assert isinstance(cache, fx.Node) and isinstance(rows, fx.Node)
    with node.graph.inserting_before(node):
        node.replace_input_with(rows, (proxy(rows) + proxy(cache).mean()).node)


@around(*STORES)
def stored_twice_one_slot_apart(node: fx.Node) -> None:
    slots = _slots_of(node)
    with node.graph.inserting_before(node):
        again = node.graph.node_copy(node)
        with node.graph.inserting_before(again):
            again.replace_input_with(slots, (proxy(slots) - 1).node)


# --- rounding and data -------------------------------------------------------------------------


@behind()
def rounded_to_half(x: P) -> P:
    return x.half().to(example(x).dtype)


@behind()
def rounded_to_bfloat16(x: P) -> P:
    return x.to(torch.bfloat16).to(example(x).dtype)


@behind()
def rounded_to_integers(x: P) -> P:
    return x.to(torch.int32).to(example(x).dtype)


@behind()
def rounded_to_quarters(x: P) -> P:
    return torch.round(x * 4) / 4


@behind()
def moved_by_a_constant(x: P) -> P:
    return x + 0.5


@behind()
def scaled(x: P) -> P:
    return x * 1.25


@behind()
def magnitude(x: P) -> P:
    return x.abs()


@behind()
def clamped(x: P) -> P:
    return x.clamp(-0.5, 0.5)


@behind()
def soft_capped(x: P) -> P:
    return torch.tanh(x)


@behind()
def negative_halved(x: P) -> P:
    return torch.where(x > 0, x, x * 0.5)


@behind()
def gated_by_itself(x: P) -> P:
    return x * torch.sigmoid(x)


@behind()
def scaled_by_its_own_mean(x: P) -> P:
    return x * x.mean(-1, keepdim=True)


@behind()
def normed_once_more(x: P) -> P:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.01)


@behind()
def softmax_of_channels(x: P) -> P:
    return x.softmax(-1)


@behind()
def running_sum(x: P) -> P:
    return x.cumsum(-1)


@behind()
def by_position(x: P) -> P:
    """A factor that grows with the token: llama4's temperature."""
    need(len(shape(x)) == 4)
    steps = torch.arange
    positions = x.node.graph.call_function(steps, (1, shape(x)[2] + 1))
    return x * proxy(positions)[:, None]


@instead("view_as_complex")
def conjugated(_: fx.Node, x: P) -> P:
    return torch.view_as_complex(x).conj().resolve_conj()


@instead("view_as_real")
def real_and_imaginary_swapped(_: fx.Node, z: P) -> P:
    return torch.view_as_real(z).flip(-1)


@instead("polar")
def circle_of_another_radius(_: fx.Node, radius: P, angle: P) -> P:
    return torch.polar(radius * 2, angle)


@instead("polar")
def circle_turned_back(_: fx.Node, radius: P, angle: P) -> P:
    return torch.polar(radius, -angle)
