"""Writes to tensors the graph made itself, as pure calls, so that the reader sees what they hold.

    out = torch.empty_like(x)                     out_1 = slice_scatter(out, a, -1, 0, None, 2)
    out[..., 0::2] = a                   ->       out_2 = slice_scatter(out_1, b, -1, 1, None, 2)
    out[..., 1::2] = b

Only tensors whose every write is of a kind known here are rewritten; inputs of the graph and their
views never are. Who reads between two writes reads what was there between them.
"""

import operator
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import fx

from fxfuse.slots import Slot, View, slots_of
from fxfuse.torch_private import copy_graph, fake_mode_of, with_graph, without_guards

# (dim, start, end, step) of a slice, (dim, index) of a row; None: the whole tensor.
Region: TypeAlias = tuple[Any, ...] | None

# Methods that write to their tensor, and the pure method that gives what they write.
WRITES = {f"{name}_": name for name in ("add", "addcmul", "div", "mul", "neg", "sub")}


class _Unknown(Exception):
    """A write, or a layout, that is not rewritten here."""


def without_own_writes(gm: fx.GraphModule, view: View) -> fx.GraphModule | None:
    """A copy of the graph without the writes to its own tensors; None if there is none that can be
    rewritten.
    """
    makers = _makers(view)
    writes: dict[int, list[fx.Node]] = {}
    for call in view.calls:
        for slot in call.writes:
            if makers.get(slot.storage) not in (None, call.node):
                writes.setdefault(slot.storage, []).append(call.node)
    own = {s for s, nodes in writes.items() if all(_is_known(view, n, makers) for n in nodes)}
    if not own:
        return None
    try:
        return _Writer(gm, view, {n for s in own for n in writes[s]}).run()
    except _Unknown:
        return None


def _makers(view: View) -> dict[int, fx.Node | None]:
    """The node that made each storage; None for memory that came into the graph."""
    makers: dict[int, fx.Node | None] = {}
    for node, result in view.results.items():
        if node.op in ("placeholder", "get_attr"):
            makers |= {slot.storage: None for slot in slots_of(result)}
    for call in view.calls:
        for slot in call.outs:
            makers.setdefault(slot.storage, call.node)
    return makers


def _is_known(view: View, node: fx.Node, makers: dict[int, fx.Node | None]) -> bool:
    """Whether a node writes to one region of a tensor that a node of its own made."""
    target: Any = node.args[0] if node.args else None
    if not isinstance(target, fx.Node) or not isinstance(view.results.get(target), Slot):
        return False
    try:
        while _is_part(target):
            _region(target.args[0], target.args[1])
            target = target.args[0]
        if node.target is operator.setitem:
            _region(*node.args[:2])
    except _Unknown:
        return False
    slot = view.results[target]
    whole = isinstance(slot, Slot) and makers[slot.storage] is target
    return whole and not node.kwargs and node.target in (operator.setitem, "copy_", *WRITES)


def _is_part(node: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.target is operator.getitem


def _region(target: Any, index: Any) -> Region:
    """The one region of a tensor that an index chooses; None for the whole."""
    example = target.meta.get("example_value")
    parts = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(example, torch.Tensor) or any(isinstance(p, fx.Node) for p in parts):
        raise _Unknown
    if any(p is Ellipsis for p in parts):
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (example.dim() - len(parts) + 1)
    chosen = [(dim, part) for dim, part in enumerate(parts) if part != slice(None)]
    if not chosen:
        return None
    (dim, part), *more = chosen
    is_slice = isinstance(part, slice)
    numbers = (part.start, part.stop, part.step or 1) if is_slice else (part,)
    if more or any(n is not None and type(n) is not int for n in numbers):
        raise _Unknown
    return (dim, *numbers)


class _Writer:
    """Copies a graph in order; `current` is the node that holds what an old node's tensor is by
    now, `stale` the old nodes whose tensor has been written to through another one.
    """

    def __init__(self, gm: fx.GraphModule, view: View, writes: set[fx.Node]) -> None:
        self.gm, self.view, self.writes = gm, view, writes
        self.graph, self.nodes = copy_graph(gm.graph)
        self.fake_mode = fake_mode_of(gm)
        self.current = dict(self.nodes)
        self.stale: set[fx.Node] = set()
        self.sharing: dict[int, list[fx.Node]] = {}
        self.trace = ""

    def run(self) -> fx.GraphModule:
        for node, copied in list(self.nodes.items()):
            self.trace = node.meta.get("stack_trace") or ""
            with self.graph.inserting_before(copied):
                if node in self.writes:
                    self._write(node)
                else:
                    for argument in node.all_input_nodes:
                        copied.replace_input_with(self.nodes[argument], self._now(argument))
            for slot in slots_of(self.view.results.get(node)):
                self.sharing.setdefault(slot.storage, []).append(node)
        for node in reversed(list(self.nodes)):
            if node in self.writes:
                self.graph.erase_node(self.nodes[node])
        self.graph.lint()
        return with_graph(self.gm, self.graph)

    def _now(self, node: fx.Node) -> fx.Node:
        """What an old node's tensor is by now; a view of what was written is taken anew."""
        if node in self.writes:
            assert isinstance(node.args[0], fx.Node)
            return self._now(node.args[0])
        if node in self.stale:
            self.stale.discard(node)
            self.current[node] = self._add(node.target, node.args, node.kwargs)
        return self.current[node]

    def _write(self, node: fx.Node) -> None:
        target, *rest = cast(tuple[Any, ...], node.args)
        region: Region = None
        if node.target is operator.setitem:
            region = _region(target, rest[0])
            value = self._fitting(target, region, rest[1])
        elif node.target == "copy_":
            value = self._fitting(target, None, rest[0])
        else:
            value = self._cast(target, self._add(WRITES[str(node.target)], node.args, {}))
        value = self._scattered(target, region, value)
        while _is_part(target):
            parent, index = cast(tuple[Any, ...], target.args)
            target, value = parent, self._scattered(parent, _region(parent, index), value)
        old, new = (n.meta["example_value"] for n in (self.nodes[target], value))
        if old.shape != new.shape or old.stride() != new.stride() or old.dtype != new.dtype:
            raise _Unknown
        slot = self.view.results[target]
        self.stale.update(n for n in self.sharing[slot.storage] if n not in self.writes)
        self.stale.discard(target)
        self.current[target] = value

    def _fitting(self, target: fx.Node, region: Region, value: Any) -> fx.Node:
        """A value in the shape and dtype of a target's region."""
        whole = self._now(target)
        part = whole.meta["example_value"]
        if region is not None:
            index = slice(*region[1:]) if len(region) == 4 else region[1]
            part = part[(slice(None),) * region[0] + (index,)]
        if not isinstance(value, fx.Node):
            return self._add("new_full", (whole, list(part.shape), value), {})
        fitting = self._cast(target, self._now(value))
        if fitting.meta["example_value"].shape != part.shape:
            fitting = self._add("expand", (fitting, list(part.shape)), {})
        return fitting

    def _scattered(self, target: fx.Node, region: Region, value: fx.Node) -> fx.Node:
        if region is None:
            return value
        scatter = torch.slice_scatter if len(region) == 4 else torch.select_scatter
        return self._add(scatter, (self._now(target), value, *region), {})

    def _cast(self, target: fx.Node, value: fx.Node) -> fx.Node:
        dtype = target.meta["example_value"].dtype
        return value if value.meta["example_value"].dtype == dtype else self._to(value, dtype)

    def _to(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self._add("to", (value, dtype), {})

    def _add(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A new call on what old nodes are by now, or on new nodes, with its example value."""
        args, kwargs = fx.map_arg(
            (args, kwargs), lambda n: n if n.graph is self.graph else self._now(n)
        )
        call = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = call(target, args, kwargs)
        live, named = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        with self.fake_mode, torch.no_grad(), without_guards(self.fake_mode):
            method = isinstance(target, str)
            run = getattr(live[0], target) if method else target
            node.meta["example_value"] = run(*(live[1:] if method else live), **named)
        node.meta["stack_trace"] = self.trace
        return node
