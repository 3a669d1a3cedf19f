"""Bodies of activation checkpointing: graphs inside the graph, with inputs that the outer one made.

In come Dynamo's graph and its reading, out come the bodies, and what each input of a body holds. A
fused op of a body is computed again in the backward, as everything there is.
"""

import functools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import fx

from fxfuse.patterns.read import Reading
from fxfuse.patterns.value import Kind
from fxfuse.slots import Slot
from fxfuse.torch_private import copy_graph, with_graph

Body: TypeAlias = tuple[str, fx.GraphModule, Callable[[fx.Node], Kind]]


def checkpointed(gm: fx.GraphModule, reading: Reading) -> Iterator[Body]:
    """Each body that one checkpoint calls: its name in the module, its graph, and what an input of
    it holds.
    """
    for node in gm.graph.nodes:
        if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
            continue
        held, *operands = node.args
        body = getattr(gm, held.target)
        inputs = [n.name for n in body.graph.nodes if n.op == "placeholder"]
        if len(held.users) > 1 or len(inputs) != len(operands):
            continue
        kinds = dict(zip(inputs, (_kind(x, reading) for x in operands), strict=True))
        yield held.target, body, functools.partial(_held, kinds)


def _held(kinds: dict[str, Kind], node: fx.Node) -> Kind:
    return kinds.get(node.name, Kind.TABLE)


def _kind(operand: object, reading: Reading) -> Kind:
    slot = reading.view.results.get(operand) if isinstance(operand, fx.Node) else None
    return reading.kinds[slot] if isinstance(slot, Slot) else Kind.TABLE


def with_bodies(gm: fx.GraphModule, bodies: dict[str, fx.GraphModule]) -> fx.GraphModule:
    """A copy of the module that holds other bodies under the same names."""
    new = with_graph(gm, copy_graph(gm.graph)[0])
    for name, body in bodies.items():
        setattr(new, name, body)
    return new
