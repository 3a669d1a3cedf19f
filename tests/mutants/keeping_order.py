"""Mutations that keep the meaning: another order of nodes, other stores, lossless casts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from tests.mutants.table import example, followers, is_float, mutation, need, writes

instead = functools.partial(mutation, "instead", keeps=True)
behind = functools.partial(mutation, "behind", keeps=True)
around = functools.partial(mutation, "around", keeps=True)
P = fx.Proxy


# --- order -------------------------------------------------------------------------------------


@around()
def moved_to_its_first_reader(node: fx.Node) -> None:
    reader = next((n for n in followers(node) if n in node.users), None)
    need(reader is not None and node.next is not reader)
    assert reader is not None
    reader.prepend(node)


@around()
def moved_behind_its_last_operand(node: fx.Node) -> None:
    before = set(node.all_input_nodes)
    need(all(not writes(n) for n in node.graph.nodes) and before)
    last = [n for n in node.graph.nodes if n in before or n.op == "placeholder"][-1]
    need(last.next is not node)
    last.append(node)


@around()
def computed_again_for_its_last_reader(node: fx.Node) -> None:
    readers = [n for n in followers(node) if n in node.users]
    need(len(readers) > 1)
    with node.graph.inserting_before(readers[-1]):
        again = node.graph.node_copy(node)
    readers[-1].replace_input_with(node, again)


# --- stores ------------------------------------------------------------------------------------


@instead("index_copy_")
def store_along_an_axis_from_the_end(_: fx.Node, cache: P, dim: int, slots: P, rows: P) -> P:
    return cache.index_copy_(dim - 4, slots, rows)


@instead("index_copy_")
def store_of_contiguous_rows(_: fx.Node, cache: P, dim: int, slots: P, rows: P) -> P:
    return cache.index_copy_(dim, slots, rows.contiguous())


@instead("index_copy_")
def store_by_index_put(_: fx.Node, cache: P, dim: int, slots: P, rows: P) -> P:
    index = (None, None, slots)[-1 - dim :]
    return torch.ops.aten.index_put_(cache, index, rows)


@instead("index_copy_")
def store_at_cast_slots(_: fx.Node, cache: P, dim: int, slots: P, rows: P) -> P:
    return cache.index_copy_(dim, slots.long(), rows)


@instead("setitem")
def store_by_index_copy(_: fx.Node, cache: P, index: Any, rows: P) -> P:
    return cache.index_copy_(2, index[2], rows)


# --- precision ---------------------------------------------------------------------------------


@behind()
def widened_and_back(x: P) -> P:
    return x.to(torch.float64).to(example(x).dtype)


@behind()
def cast_to_its_own_dtype(x: P) -> P:
    return x.to(dtype=example(x).dtype)


@instead("mul")
def type_as_of_an_operand(_: fx.Node, a: Any, b: Any) -> P:
    need(isinstance(a, P) and isinstance(b, P) and is_float(a.node) and is_float(b.node))
    return a.type_as(b) * b


@behind()
def scaled_by_a_power_of_two_and_back(x: P) -> P:
    return x * 16 * 0.0625
