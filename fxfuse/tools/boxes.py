"""One attention layer of a graph as boxes: what a picture shows of each node.

In: Dynamo's graph and the one that fxfuse made of it. Out: for each the boxes of one layer, that of
the first fused site: the nodes of its module, and what comes into it from outside.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from fxfuse.patterns.site import location
from fxfuse.report import Fused

DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
PROJECTIONS = ("linear", "matmul", "bmm", "addmm", "einsum")
ATTENTIONS = ("scaled_dot_product_attention", "flex_attention", "softmax")
LONGEST = 30


@dataclasses.dataclass(frozen=True)
class Box:
    """One node.

    kind    fused, replaced, projection, attention, outside or plain
    label   what it does; `shape` what it makes
    hover   everything else, with the model's file:line
    inputs  names of the boxes it reads
    """

    name: str
    kind: str
    label: str
    shape: str
    hover: str
    inputs: tuple[str, ...]


def layers_of(
    before: fx.GraphModule, after: fx.GraphModule, site: Fused
) -> tuple[list[Box], list[Box]]:
    """The boxes of the layer of a fused site, before and after."""
    op = next(n for n in after.graph.nodes if _name(n) == site.op)
    old, new = {n.name for n in before.graph.nodes}, {n.name for n in after.graph.nodes}
    source = op
    while source.name not in old:
        source = source.all_input_nodes[0]
    scope = _scope(op, source)
    if scope:
        inside = [_members(graph, scope) for graph in (before, after)]
    else:
        gone = {n for n in before.graph.nodes if n.name not in new}
        around = {x for n in gone for x in (*n.all_input_nodes, *n.users)}
        made = {n for n in after.graph.nodes if n.name not in old}
        inside = [gone | around, made | {n for n in after.graph.nodes if n.name in _names(around)}]
    replaced = [n for n in before.graph.nodes if n in inside[0] and n.name not in new]
    told = _told(site, replaced)
    return (
        _boxes(before, inside[0], {n.name: "replaced" for n in replaced}, {}),
        _boxes(after, inside[1], {op.name: "fused"}, {op.name: told}),
    )


def _scope(op: fx.Node, source: fx.Node) -> str:
    """The innermost module of the model that holds the op and what it reads; empty where no module
    does.
    """
    shared = _modules(source)
    return next((key for key in reversed(_modules(op)) if key in shared), "")


def _modules(node: fx.Node) -> list[str]:
    """Keys of the modules a node stands in, the outermost first."""
    return list(node.meta.get("nn_module_stack") or {})


def _members(gm: fx.GraphModule, scope: str) -> set[fx.Node]:
    return {n for n in gm.graph.nodes if scope in (n.meta.get("nn_module_stack") or {})}


def _names(nodes: Collection[fx.Node]) -> set[str]:
    return {n.name for n in nodes}


def _boxes(
    gm: fx.GraphModule, inside: set[fx.Node], kinds: dict[str, str], told: dict[str, str]
) -> list[Box]:
    """In the graph's order; weights, sizes and what only makes sizes are left out. Who reads memory
    after it was written reads the node that wrote.
    """
    shown = [n for n in gm.graph.nodes if n in inside and _is_shown(n)]
    read = {x for n in shown for x in n.all_input_nodes}
    outside = [n for n in gm.graph.nodes if n in read - set(shown) and _is_shown(n)]
    names = _names([*shown, *outside])
    found = []
    last: dict[fx.Node, str] = {}
    for node in (*outside, *shown):
        away = node not in inside or node.op == "placeholder"
        kind = "outside" if away else kinds.get(node.name) or _kind(node)
        sources = [last.get(x, x.name) for x in node.all_input_nodes if x.name in names]
        inputs = () if away else tuple(dict.fromkeys(sources))
        last |= dict.fromkeys(() if away else _written(node), node.name)
        hover = told.get(node.name, "")
        found.append(Box(node.name, kind, _label(node), _shape(node), _hover(node) + hover, inputs))
    return found


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes to."""
    if isinstance(node.target, torch._ops.OpOverload):
        pairs = zip(node.target._schema.arguments, node.args, strict=False)
        found: list[Any] = [x for a, x in pairs if a.alias_info and a.alias_info.is_write]
    else:
        in_place = _name(node).endswith("_") and not _name(node).endswith("__")
        found = [node.args[0]] if in_place and node.args else []
    return [x for x in found if isinstance(x, fx.Node)]


def _is_shown(node: fx.Node) -> bool:
    example = _example(node)
    tensors = example if isinstance(example, (tuple, list)) else (example,)
    held = any(isinstance(x, torch.Tensor) for x in tensors)
    return held and not isinstance(example, torch.nn.Parameter) and node.op != "output"


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _kind(node: fx.Node) -> str:
    name = _name(node)
    if any(part in name for part in PROJECTIONS):
        return "projection"
    return "attention" if any(part in name for part in ATTENTIONS) else "plain"


def _name(node: fx.Node) -> str:
    """What a node calls, as short as it can be told."""
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.name
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target)


def _label(node: fx.Node) -> str:
    name = _name(node)
    if name == "getitem":
        index = node.args[1]
        name = f"[{index}]" if isinstance(index, int) else "slice"
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _shape(node: fx.Node) -> str:
    example = _example(node)
    if not isinstance(example, torch.Tensor):
        return ""
    dtype = str(example.dtype).removeprefix("torch.")
    letters = dtype.rstrip("0123456789")
    short = dtype.replace(letters, DTYPES.get(letters, letters), 1)
    return f"{'×'.join(map(str, example.shape))} {short}"


def _hover(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    files = [i for i, line in enumerate(lines) if line.startswith("File ")]
    code = lines[files[-1] + 1 : files[-1] + 2] if files else []
    weights = [str(x.target) for x in node.all_input_nodes if not _is_shown(x)]
    told = [f"{node.name}: {_name(node)}", location(node), *code]
    told += [f"reads {', '.join(weights)}"] if weights and node.op != "placeholder" else []
    return "\n".join(part for part in told if part)


def _told(site: Fused, replaced: list[fx.Node]) -> str:
    """What a fused op stands for."""
    lines = dict.fromkeys(location(n) for n in replaced if n.meta.get("stack_trace"))
    head = f"\n{' + '.join(site.stages)}, by {site.provider}\nin place of {len(replaced)} nodes:"
    return "\n  ".join((head, *lines))
