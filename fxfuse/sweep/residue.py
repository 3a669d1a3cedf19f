"""What is left of a rotation in a graph after fusing, found without fxfuse's reader.

In: the graph that the compiler is handed. Out: every multiplication of a table of cosines or sines
with data whose result reaches an attention, before a projection, or leaves the graph; and the fused
ops in the graph. Tables times tables, times numbers, and products that only a linear layer reads
(time steps, positions added to an embedding) are no residue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxfuse.patterns.site import location

FUSED_OPS = ("norm_rope", "norm_rope_store_")
MAKES_TABLE = {"cos", "sin", "polar", "cos_", "sin_"}
MULTIPLIES = {"mul", "mul_", "imul", "multiply", "addcmul", "addcmul_", "einsum"}
MATRIX_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
# In-place without a trailing underscore.
WRITES = {"setitem", "iadd", "isub", "imul", "itruediv"}
ATTENDS = re.compile(r"attention|^matmul$|^bmm$|^baddbmm$|^einsum$")
PROJECTS = re.compile(r"^linear$|^addmm$|conv\dd?$|^conv|embedding|^grouped_mm|^_grouped_mm")
# Inputs that are tables: names as l_position_embeddings_0_ or freqs_cis; inv_freq is none.
TABLE_INPUT = re.compile(
    r"(^|_)(cos|sin|freqs|freqs_cis|rotary|rope|position_embeddings|sincos|"
    r"rotary_emb|rotary_pos_emb)(_|\d|$)"
)
NO_TABLE_INPUT = re.compile(r"inv_freq|weight|bias")
# Tables that a model keeps as a parameter; where they are added to an embedding nothing multiplies.
TABLE_WEIGHT = re.compile(r"embed_positions|sinusoid")


@dataclass(frozen=True)
class Residue:
    """One multiplication that a fused graph should not have."""

    node: str
    where: str

    def __str__(self) -> str:
        return f"{self.node} at {self.where}"


@dataclass(frozen=True)
class Remains:
    """Fused ops in a graph, those of them that store, and what is left of rotations."""

    ops: int
    stores: int
    residue: tuple[Residue, ...]


def remains_of(gm: fx.GraphModule) -> Remains:
    """What a graph holds, the graphs it calls included."""
    graphs = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    calls = [n for g in graphs for n in g.graph.nodes if _name(n) in FUSED_OPS]
    return Remains(
        ops=len(calls),
        stores=sum(_name(n) == "norm_rope_store_" for n in calls),
        residue=tuple(r for g in graphs for r in _residue(g)),
    )


def _residue(gm: fx.GraphModule) -> Iterator[Residue]:
    tables = _tables(gm.graph)
    for node in gm.graph.nodes:
        if _rotates(node, tables) and _reaches_attention(node):
            yield Residue(node.name, location(node))


def _tables(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that hold cosines or sines, in whatever view, order, dtype and scale."""
    tables: set[fx.Node] = set()
    for node in graph.nodes:
        operands = [n for n in node.all_input_nodes if _is_number(n)]
        made = _name(node) in MAKES_TABLE or _is_table_input(node)
        known = [n for n in operands if n in tables]
        if made or (known and all(n in tables or _is_blank(n) for n in operands)):
            tables.add(node)
            if written := _written(node):
                tables |= set(_aliases(written))
    return tables


def _is_table_input(node: fx.Node) -> bool:
    if node.op not in ("placeholder", "get_attr") or not _is_number(node):
        return False
    if TABLE_WEIGHT.search(node.name):
        return True
    if isinstance(_example(node), nn.Parameter) or NO_TABLE_INPUT.search(node.name):
        return False
    return bool(TABLE_INPUT.search(node.name))


def _is_blank(node: fx.Node) -> bool:
    """A tensor made from nothing: what a table is written into, or a number as a tensor."""
    blank = _name(node) in ("zeros", "empty", "ones", "zeros_like", "empty_like", "ones_like")
    example = _example(node)
    return blank or (isinstance(example, Tensor) and example.dim() == 0)


def _rotates(node: fx.Node, tables: set[fx.Node]) -> bool:
    """Whether a node multiplies a table with something that is none."""
    name = _name(node)
    if name not in MULTIPLIES | MATRIX_PRODUCTS:
        return False
    # The first operand of these two is added to the product.
    skip = 1 if name in ("addcmul", "addcmul_", "baddbmm") else 0
    factors = [n for n in node.all_input_nodes[skip:] if _is_number(n) and not _is_blank(n)]
    found = [n in tables for n in factors]
    return any(found) and not all(found)


def _reaches_attention(start: fx.Node) -> bool:
    seen, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        readers: Iterable[fx.Node] = node.users
        if written := _written(node):
            readers = [u for alias in _aliases(written) for u in (alias, *alias.users)]
        for reader in readers:
            if reader.op == "output" or ATTENDS.search(_name(reader)):
                return True
            if reader not in seen and not _ends_the_way(_name(reader)):
                seen.add(reader)
                waiting.append(reader)
    return False


def _ends_the_way(name: str) -> bool:
    """Behind a projection, or inside a cosine, a product is no q or k of this layer."""
    return name in MAKES_TABLE or bool(PROJECTS.search(name))


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor that a node changes in place."""
    name = _name(node)
    changes = name in WRITES or (name.endswith("_") and not name.endswith("__"))
    target = node.args[0] if changes and node.args else None
    return target if isinstance(target, fx.Node) else None


def _aliases(node: fx.Node) -> list[fx.Node]:
    """Every node over the same memory."""
    memory = _memory(node)
    if memory is None:
        return [node]
    return [n for n in node.graph.nodes if _memory(n) == memory]


def _memory(node: fx.Node) -> int | None:
    example = _example(node)
    return int(example.untyped_storage()._cdata) if isinstance(example, Tensor) else None


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _is_number(node: fx.Node) -> bool:
    example = _example(node)
    if isinstance(example, (tuple, list)):
        example = next((x for x in example if isinstance(x, Tensor)), None)
    return isinstance(example, Tensor) and (example.is_floating_point() or example.is_complex())


def _name(node: fx.Node) -> str:
    """The bare name of what a node calls: mul for torch.mul, aten.mul.Tensor, x.mul and x * y."""
    if node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(node.target, str):
        return node.target
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).rsplit(".", 1)[-1]
