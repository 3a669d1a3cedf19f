"""Debug mode: every fused op of a rewritten graph between two checks.

In comes the graph that the compiler would get; out comes a copy where each op's inputs pass a check
of `fxfuse.debug_checks` before it, and its results one behind it.
"""

import itertools
import operator
from typing import Any

import torch
from torch import fx

from fxfuse import debug_checks
from fxfuse.patterns.site import location
from fxfuse.torch_private import copy_graph, with_graph

# A number for each site that is compiled: what is compiled anew is compared anew.
_numbers = itertools.count(1)


def watched(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with checks around its fxfuse ops; the graph itself where it has none."""
    names = {getattr(torch.ops.fxfuse, name).default: name for name in debug_checks.CARRIERS}
    if not any(node.target in names for node in gm.graph.nodes if node.op == "call_function"):
        return gm
    graph, _ = copy_graph(gm.graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in names:
            _watch(graph, node, names[node.target])
    graph.lint()
    return with_graph(gm, graph)


def _watch(graph: fx.Graph, node: fx.Node, name: str) -> None:
    ops = torch.ops.fxfuse_debug
    where = f"{location(node)} (site {next(_numbers)}, node {node.name})"
    # Inductor's C++ wrapper writes a string as it is between quotes.
    text = node.args[-1].replace('"', "'")  # type: ignore[union-attr]
    carrier = debug_checks.CARRIERS[name]
    operand: Any = node.args[carrier]

    def add(target: Any, args: tuple[Any, ...], example: Any) -> fx.Node:
        new = graph.call_function(target, args)
        new.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        new.meta["example_value"] = example
        return new

    with graph.inserting_before(node):
        before = getattr(ops, f"before_{name}").default
        args = (*node.args[:-1], text, where)
        checked = add(before, args, operand.meta["example_value"])
    node.update_arg(carrier, checked)
    examples = node.meta["example_value"]
    readers = [user for user in node.users if user.target is operator.getitem]
    with graph.inserting_after(node):
        first = add(operator.getitem, (node, 0), examples[0])
    with graph.inserting_after(first):
        second = add(operator.getitem, (node, 1), examples[1])
    with graph.inserting_after(second):
        after = getattr(ops, f"after_{name}").default
        args = (first, second, *node.args[:-1], text, where)
        stores = name.endswith("_")
        results = add(after, args, None if stores else examples)
    for reader in readers:
        if not stores:
            reader.update_arg(0, results)
