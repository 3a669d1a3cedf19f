"""docs/how_it_works.md: the way of one graph through fxfuse, each stage's result as it really is.

    python -m tests.way_document    # writes it

In: a tiny Qwen3 of one layer that decodes one token into a static cache. Out: the document. Its
graph and line numbers are those of the versions in constraints.txt.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

import fxfuse
from fxfuse.lens import look
from fxfuse.lowering import launch, providers
from fxfuse.lowering.operand import Operand
from fxfuse.lowering.providers import arguments
from fxfuse.passes import fuse_graph, kind_of, placeholder_kinds
from fxfuse.patterns.plan import Plan, plan
from fxfuse.patterns.prove import TOLERANCE
from fxfuse.patterns.read import Reading, read
from fxfuse.patterns.record import Record
from fxfuse.patterns.site import Access, Site, location
from fxfuse.patterns.value import Index, Term, Value
from fxfuse.rewrite import rewrite
from fxfuse.settings import Settings
from fxfuse.slots import View
from tests.models.families import FAMILIES
from tests.models.tiny import build, static_cache, token_ids

FILE = Path(__file__).parents[1] / "docs" / "how_it_works.md"
TEXT = Path(__file__).parent / "way_document.md"
WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Way:
    """The result of each stage, for one graph."""

    dynamo: fx.GraphModule
    view: View
    reading: Reading
    plan: Plan
    rewritten: fx.GraphModule
    report: fxfuse.Report

    @property
    def site(self) -> Site:
        (site,) = self.plan.sites
        return site

    @property
    def op(self) -> fx.Node:
        (op,) = (n for n in self.rewritten.graph.nodes if "norm_rope_store_" in str(n.target))
        return op


@functools.cache
@torch.no_grad()
def way() -> Way:
    """The stages one by one, as `fxfuse.passes.fuse_graph` runs them."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    model: Any = build(FAMILIES["qwen3"], num_hidden_layers=1)
    cache = static_cache(model, slots=8, batch=1)
    torch.compile(model, backend=backend)(token_ids(1, batch=1), past_key_values=cache)
    (gm,) = graphs
    fused, report = fuse_graph(gm, Settings())
    view = look(gm)
    reading = read(view, placeholder_kinds(gm, kind_of))
    planned = plan(reading, store=True, training=False, gate=lambda kind, *_: _only(kind))
    rewritten = rewrite(gm, view, planned)
    assert rewritten.code == fused.code, "the document runs other stages than fuse_graph"
    return Way(gm, view, reading, planned, rewritten, report)


def _only(kind: str) -> str:
    """What the gate says for one token on a CPU."""
    return "" if kind in ("attention", "grouped_heads") else "Inductor's own kernel is as fast"


# --- names -------------------------------------------------------------------------------------


def short(text: str) -> str:
    """Dynamo's names of parameters and caches, as the model calls them."""
    text = re.sub(r"l_self\w*?_modules_(\w+?)_parameters_weight_", r"\1.weight", text)
    text = re.sub(r"\w*_modules_(\w+\.weight)", r"\1", text)
    text = re.sub(r"l_kwargs_past_key_values_layers_0_(\w+)", r"cache.\1", text)
    return text


def name(node: fx.Node) -> str:
    return short(node.name)


def shown(x: Any) -> str:
    """An argument of a call."""
    if isinstance(x, fx.Node):
        return name(x)
    if isinstance(x, (tuple, list)):
        return f"({', '.join(map(shown, x))})"
    if isinstance(x, slice):
        parts = ["" if p is None else str(p) for p in (x.start, x.stop)]
        return ":".join(parts)
    return "..." if x is Ellipsis else str(x)


def called(node: fx.Node) -> str:
    """A node as a line of Python."""
    target = node.target if isinstance(node.target, str) else node.target.__name__
    kwargs = [f"{k}={shown(v)}" for k, v in node.kwargs.items()]
    args = ", ".join([*map(shown, node.args), *kwargs])
    if node.target is operator.getitem and isinstance(node.args[1], tuple):
        index = shown(node.args[1])[1:-1]
        return f"{name(node)} = {shown(node.args[0])}[{index}]"
    return f"{name(node)} = {target}({args})"


def chain(of: Way) -> list[fx.Node]:
    """What makes q of its projection, and the writes to the cache."""
    nodes = list(of.dynamo.graph.nodes)
    made = of.site.q.slot.node
    source = of.site.q.x.leaf.slot.node
    below, above = {source}, {made}
    for node in nodes:
        if below & set(node.all_input_nodes):
            below.add(node)
    for node in reversed(nodes):
        if node in above:
            above |= set(node.all_input_nodes)
    writes = {store.call.node for store in of.site.stores()}
    return [n for n in nodes if n in (below & above) | writes]


# --- what each stage hands on ------------------------------------------------------------------


def captured(of: Way) -> Iterator[str]:
    for node in chain(of):
        yield f"{called(node):72s} # {location(node).rpartition('/')[2]}"


def calls(of: Way) -> Iterator[str]:
    """The lens's calls of the chain, each with what its result is."""
    nodes = set(chain(of))
    for call in of.view.calls:
        if call.node not in nodes:
            continue
        writes = ", ".join(f"storage {slot.storage}" for slot in call.writes)
        for slot in call.outs:
            shape = "x".join(map(str, slot.shape))
            op = str(call.op).removesuffix(".default")
            says = f"writes {writes}" if writes else f"storage {slot.storage}"
            yield f"{name(call.node):17s} {op:22s} {shape:9s} {says}"


def values(of: Way) -> Iterator[str]:
    """The Value of each result of the chain that is no cache's."""
    for node in chain(of):
        slot = of.view.results[node]
        if slot in of.reading.values and not (slot.call and slot.call.writes):
            yield f"{name(node):17s} {of.reading.values[slot]}"


def leaves(of: Way) -> Iterator[str]:
    value = of.reading.values[of.site.q.slot]
    for leaf in value.leaves():
        where = name(leaf.slot.node) if leaf.slot is not None else "no node"
        by = f", {leaf.definition.op} of {leaf.definition.operands[0]}" if leaf.definition else ""
        yield f"{leaf!s:9s} {leaf.kind.value:6s} {where}{by}"


def channel(value: Value, at: int) -> str:
    """A Value's terms for one channel, its last dim; other axes are left out."""
    position = _position(value, at)
    parts = [_term(term, *position) for term in value.terms]
    return " ".join(part for part in parts if part).removeprefix("+ ")


def _position(value: Value, at: int) -> tuple[int, dict[Any, int]]:
    """The place among the explicit atoms, and each channel atom's index."""
    index: dict[Any, int] = {}
    for atom in reversed(value.dims[-1]):
        index[atom] = at % atom.size
        at //= atom.size
    place = 0
    for atom in value.explicit:
        place = place * atom.size + index.get(atom, 0)
    return place, index


def _term(term: Term, place: int, index: dict[Any, int]) -> str:
    def pick(of: tuple[Any, ...]) -> Any:
        return of[place if len(of) > 1 else 0]

    def axis(i: Index) -> int:
        return int(pick(i.offsets)) + sum(s * index.get(a, 0) for a, s in i.strides)

    number = pick(term.coefficients)
    if not number:
        return ""
    factors = [
        f"{f.leaf}" + (f"[{axis(f.axes[-1])}]" if f.leaf.shape[-1] != 1 else "")
        for f in term.factors
    ]
    return f"{'-' if number < 0 else '+'} {' · '.join(factors)}"


def said(thing: Any) -> str:
    """A dataclass of plain data, without what is as its default has it."""
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return repr(thing)
    fields = [
        f"{f.name}={said(getattr(thing, f.name))}"
        for f in dataclasses.fields(thing)
        if f.default is dataclasses.MISSING or getattr(thing, f.name) != f.default
    ]
    return f"{type(thing).__name__}({', '.join(fields)})"


def _operand(access: Access | None) -> str:
    if access is None:
        return "none"
    steps = "".join(f".{step}({', '.join(map(str, args))})" for step, *args in access.steps)
    return f"{name(access.leaf.slot.node)}{steps}"


def planned(of: Way) -> Iterator[str]:
    site = of.site
    for label, decoded in (("q", site.q), ("k", site.k), ("v", site.v)):
        assert decoded is not None
        yield f"{label:8s} {name(decoded.slot.node)}, made of {_operand(decoded.x)}"
    yield f"{'weights':8s} {_operand(site.q.weight)}, {_operand(site.k and site.k.weight)}"
    yield f"{'cos':8s} {_operand(site.q.cos)}"
    yield f"{'sin':8s} {_operand(site.q.sin)}"
    yield f"{'slots':8s} {', '.join(map(_operand, site.slots))}"
    caches = ", ".join(name(store.cache.node) for store in site.stores())
    yield f"{'caches':8s} {caches}"
    yield f"{'before':8s} {name(site.before)}"
    yield f"{'eps':8s} {site.q.eps}, {site.k.eps if site.k else None}"


def recorded(of: Way) -> Iterator[str]:
    record: Record = of.site.record
    for field in dataclasses.fields(record):
        yield from wrapped(f"{field.name} = {said(getattr(record, field.name))}")


def wrapped(text: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="    ", break_long_words=False)


def rewritten(of: Way) -> Iterator[str]:
    """The op's call, by the names of its arguments; what is not there is left out."""
    op = of.op
    given = zip(arguments("norm_rope_store_"), op.args, strict=True)
    parts = [f"{key}={_text(key, x)}" for key, x in given if x is not None]
    yield from wrapped(f"{name(op)} = fxfuse::norm_rope_store_({', '.join(parts)})")
    for reader in _readers(op):
        yield from wrapped(called(reader))


def _text(key: str, x: Any) -> str:
    return f"'{x[:24]}...'" if key == "record" else shown(x)


def _readers(op: fx.Node) -> list[fx.Node]:
    """The op's result, up to attention."""
    found, node = [], op
    while len(node.users) == 1 and "attention" not in str(node.target):
        (node,) = node.users
        found.append(node)
    return found


def _tensors(of: Way) -> dict[str, torch.Tensor]:
    """The op's tensors as the graph knows them, by the names of its arguments."""
    given = zip(arguments("norm_rope_store_"), of.op.args, strict=True)
    return {k: x.meta["example_value"] for k, x in given if isinstance(x, fx.Node)}


def chosen(of: Way) -> Iterator[str]:
    """Who takes the op on a device type."""
    for device in ("cpu", "cuda"):
        choice = providers.choose(device, providers.facts_of(of.site.record, _tensors(of)))
        declined = "".join(f"   {who} declined: {why}" for who, why in choice.declined)
        yield f"{device:5s} {choice.provider}{declined}"


def launched(of: Way) -> Iterator[str]:
    """The launch of the Triton kernel for a Hopper GPU."""
    tensors = _tensors(of) | {"q_out": torch.empty_like(_tensors(of)["q"])}
    operands = {k: Operand.of(x) for k, x in tensors.items()}
    found = launch.plan(of.site.record, operands, (of.site.q.eps, 0.0), 1, "sm_90")
    site = found.constants["SITE"]
    tile = f"{site[launch.TOKENS]} x {site[0][-1]} rows of q (tokens x heads)"
    yield f"kernel     {found.kernel}"
    yield f"grid       {found.grid}, {found.warps} warps; a program has {tile}"
    yield f"pointers   {', '.join(key for key in found.arguments if key in _pointers(tensors))}"


def _pointers(tensors: Iterable[str]) -> set[str]:
    return {f"{key}_ptr" for key in tensors}


def reported(of: Way) -> Iterator[str]:
    report = dataclasses.replace(of.report, milliseconds={})
    yield from str(report).splitlines()


# --- the document ------------------------------------------------------------------------------


def document() -> str:
    """The whole of docs/how_it_works.md: the text of way_document.md with each {name} filled in."""
    of = way()
    q = of.reading.values[of.site.q.slot]
    parts = {
        "captured": captured(of),
        "calls": calls(of),
        "values": values(of),
        "leaves": leaves(of),
        "channels": [f"q[{i}] = {channel(q, i)}" for i in (0, q.shape[-1] // 2)],
        "planned": planned(of),
        "record": recorded(of),
        "rewritten": rewritten(of),
        "chosen": chosen(of),
        "launched": launched(of),
        "reported": reported(of),
    }
    before, after = (len(g.graph.nodes) for g in (of.dynamo, of.rewritten))
    numbers = {
        "before": str(before),
        "after": str(after),
        "chain": str(len(chain(of))),
        "calls_of_all": str(len(of.view.calls)),
        "tolerance": f"{TOLERANCE:.0e}",
        "torch": torch.__version__.partition("+")[0],
        "transformers": __import__("transformers").__version__,
    }
    return filled(TEXT.read_text(), {k: block(v) for k, v in parts.items()} | numbers)


def block(lines: Iterable[str]) -> str:
    return "\n".join(line.rstrip() for line in lines)


def filled(text: str, parts: dict[str, str]) -> str:
    """The text with each {{name}} replaced; every part is used."""
    used = set(re.findall(r"\{\{(\w+)\}\}", text))
    assert used == parts.keys(), f"{used ^ parts.keys()}"
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], text)


if __name__ == "__main__":
    FILE.write_text(document())
