"""The table of mutations, and how one is applied to a copy of a Dynamo graph.

A mutation is one function under a decorator that names the ops it takes and how it is placed:

    instead   its operands in, as `fx.Proxy`; what it returns stands where the node stood
    behind    its result in; every reader of the node reads what the function returns
    around    the node itself, for edits of the order or of several nodes

`keeps=True` says that the results stay the same. A function that does not fit a node raises
NoPlace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxfuse.torch_private import copy_graph, without_guards

Place = Literal["instead", "behind", "around"]
Function = Callable[..., Any]


class NoPlace(Exception):
    """The mutation does not fit the node."""


@dataclass(frozen=True)
class Mutation:
    name: str
    keeps: bool
    place: Place
    ops: frozenset[str]
    function: Function


MUTATIONS: dict[str, Mutation] = {}


def mutation(place: Place, *ops: str, keeps: bool) -> Callable[[Function], Function]:
    """Enter a mutation of the given ops into the table; of any float tensor, if none is given."""

    def register(function: Function) -> Function:
        name = function.__name__
        assert name not in MUTATIONS, f"two mutations named {name}"
        MUTATIONS[name] = Mutation(name, keeps, place, frozenset(ops), function)
        return function

    return register


def need(fits: object) -> None:
    if not fits:
        raise NoPlace


# --- what a node is ----------------------------------------------------------------------------

_SAME_OP = {"truediv": "div", "concat": "cat", "__neg__": "neg"}


def op_of(node: fx.Node) -> str:
    """The op's short name; `index` for a tensor's getitem, `part` for one of a tuple."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    name = getattr(node.target, "__name__", "")
    if name == "getitem":
        return "index" if isinstance(example(node.args[0]), Tensor) else "part"
    return _SAME_OP.get(name, name)


def example(x: Any) -> Any:
    """What a node or proxy gives, as fake tensors; anything else is itself."""
    if isinstance(x, fx.Proxy):
        x = x.node
    return x.meta.get("example_value") if isinstance(x, fx.Node) else x


def shape(x: Any) -> tuple[int, ...]:
    return tuple(example(x).shape)


def dim_of(node: fx.Node, position: int = 1) -> int:
    """A call's dim, counted from the front of its result."""
    dim = node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)
    assert isinstance(dim, int)
    return dim % len(shape(node))


def writes(node: fx.Node) -> bool:
    """Whether a node writes in place, by the name of its op."""
    name = op_of(node)
    return name == "setitem" or (name.endswith("_") and not name.endswith("__"))


def is_float(node: fx.Node) -> bool:
    t = example(node)
    return isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 0


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Equal for proxies of one graph, as fx asks of the operands of one call."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tracer) and other.graph is self.graph

    def __hash__(self) -> int:
        return id(self.graph)


def proxy(node: fx.Node) -> fx.Proxy:
    return fx.Proxy(node, _Tracer(node.graph))


def proxies(arguments: Any) -> Any:
    return fx.node.map_arg(arguments, proxy)


# --- places, and applying ----------------------------------------------------------------------


def places(graph: fx.Graph, keeps: bool) -> dict[str, list[fx.Node]]:
    """The mutations of one sort, by name, and the nodes behind the projections they may fit."""
    nodes = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
    by_op: dict[str, list[fx.Node]] = {}
    for node in nodes[max(i for i, n in enumerate(nodes) if op_of(n) == "linear") :]:
        by_op.setdefault(op_of(node), []).append(node)
    attention = by_op.get("scaled_dot_product_attention", [])
    tensors = [n for group in by_op.values() for n in group if is_float(n) and not writes(n)]
    tensors = [n for n in tensors if n not in attention]
    found = {
        m.name: [n for op in sorted(m.ops) for n in by_op.get(op, [])] if m.ops else tensors
        for m in MUTATIONS.values()
        if m.keeps == keeps
    }
    return {name: places for name, places in found.items() if places}


def mutated(graph: fx.Graph, mutation: Mutation, node: fx.Node, fake_mode: Any) -> fx.Graph:
    """A mutated copy of the graph with new example values. Raises NoPlace where nothing changes or
    no tensor could be made that way.
    """
    copied, nodes = copy_graph(graph)
    try:
        _apply(mutation, nodes[node])
        _prune(copied)
        copied.lint()
        with _quiet():
            _refresh(graph, copied, nodes, fake_mode)
    except Exception as error:
        raise NoPlace from error
    need(str(copied) != str(graph))
    return copied


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that the fake mode logs for shapes that do not fit."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    old = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(old)


def _apply(mutation: Mutation, node: fx.Node) -> None:
    graph = node.graph
    if mutation.place == "around":
        mutation.function(node)
        return
    with graph.inserting_before(node if mutation.place == "instead" else node.next):
        if mutation.place == "instead":
            new = mutation.function(node, *proxies(node.args), **proxies(node.kwargs))
            node.replace_all_uses_with(new.node)
            if not node.users:
                graph.erase_node(node)
            return
        users = set(node.users)
        new = mutation.function(proxy(node))
        node.replace_all_uses_with(new.node, delete_user_cb=users.__contains__)


def _prune(graph: fx.Graph) -> None:
    """Erase calls whose results nobody reads, but never one that writes."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_method") and not node.users and not writes(node):
            graph.erase_node(node)


def _refresh(old: fx.Graph, new: fx.Graph, nodes: dict[fx.Node, fx.Node], fake_mode: Any) -> None:
    """New example values for what the mutation made or changed and all behind it, under the fake
    mode that Dynamo traced under.
    """
    wanted = {nodes[n]: fx.node.map_arg((n.args, n.kwargs), nodes.__getitem__) for n in old.nodes}
    changed = {n for n in new.nodes if wanted.get(n) != (n.args, n.kwargs)}
    with fake_mode, torch.no_grad(), without_guards(fake_mode):
        for node in new.nodes:
            if node.op == "output" or not (node in changed or changed & {*node.all_input_nodes}):
                continue
            changed.add(node)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), example)
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                value = node.target(*args, **kwargs)
            if value is not None:
                node.meta["example_value"] = value


def followers(node: fx.Node) -> Iterator[fx.Node]:
    """The calls behind a node, in order."""
    node = node.next
    while node.op != "output":
        yield node
        node = node.next
