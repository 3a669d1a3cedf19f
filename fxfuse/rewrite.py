"""Rewrite: a planned site becomes one fxfuse op in a copy of Dynamo's graph; what nothing uses any
more is erased.

The graph handed in stays as it was: a rewrite that fails half-way leaves the original whole.
"""

import operator
from collections.abc import Set
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse.patterns.held import held
from fxfuse.patterns.plan import Plan
from fxfuse.patterns.record import DecodeAttention
from fxfuse.patterns.site import (
    Access,
    Decoded,
    GroupedSite,
    NormSite,
    Projection,
    Repeated,
    Site,
    Step,
)
from fxfuse.slots import Call, Scalar, Slot, View, slots_of
from fxfuse.torch_private import copy_graph, fake_mode_of, size_of, with_graph, without_guards


def rewrite(gm: fx.GraphModule, view: View, plan: Plan) -> fx.GraphModule:
    """A copy of the graph with every site of the plan replaced by its op."""
    graph, nodes = copy_graph(gm.graph)
    editor = _Editor(graph, view, nodes, fake_mode_of(gm))
    for group in plan.groups:
        editor.group(group)
    # In the graph's order: one may read the sum or the norm of another.
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    sites: list[NormSite | Site] = [*plan.norms, *plan.sites]
    for site in sorted(sites, key=lambda s: order[s.before]):
        if isinstance(site, NormSite):
            editor.replace_norm(site)
        else:
            editor.replace(site)
    editor.erase()
    graph.lint()
    return with_graph(gm, graph)


class _Editor:
    def __init__(
        self, graph: fx.Graph, view: View, nodes: dict[fx.Node, fx.Node], fake_mode: FakeTensorMode
    ) -> None:
        self.graph, self.view, self.nodes, self.fake_mode = graph, view, nodes, fake_mode
        self.holder = view.holders()
        self.named: dict[Slot, list[fx.Node]] = {}
        for node, result in view.results.items():
            if isinstance(result, Slot):
                self.named.setdefault(result, []).append(node)
        calls = {n for n in view.results if n.op in ("call_function", "call_method")}
        writing = {c.node for c in view.calls if c.writes or c.op is None}
        self.pure = {nodes[n] for n in calls - writing if slots_of(view.results[n])}
        self.examples: dict[Any, Any] = {}
        self.readers: dict[Slot, set[fx.Node]] = {}
        for call in view.calls:
            for slot in call.inputs():
                self.readers.setdefault(slot, set()).add(nodes[call.node])
        self.dead: list[fx.Node] = []
        # Sums and norms that an op makes now.
        self.rows: dict[Slot, fx.Node] = {}

    def group(self, site: GroupedSite) -> None:
        """Attention reads k and v as they were before their heads were repeated."""
        node = self.nodes[site.call.node]
        self.dead += node.all_input_nodes
        if isinstance(site.record, DecodeAttention):
            self._decode(site, site.record, node)
            return
        with self.graph.inserting_before(node):
            for i, name, operand in ((1, "key", site.key), (2, "value", site.value)):
                new = self._before_repeats(operand, node)
                if name in node.kwargs:
                    node.update_kwarg(name, new)
                else:
                    node.update_arg(i, new)
        node.update_kwarg("enable_gqa", True)

    def _decode(self, site: GroupedSite, record: DecodeAttention, node: fx.Node) -> None:
        """The node calls the op instead; whoever knows it, as a reader or a place, still does."""
        with self.graph.inserting_before(node):
            key, value = (self._before_repeats(x, node) for x in (site.key, site.value))
        mask = self._holder(site.mask) if site.mask else None
        node.target = torch.ops.fxfuse.decode_attention.default
        node.args = (
            self._holder(site.query), key, value, mask, site.scale, record.to_text(),
        )  # fmt: skip
        node.kwargs = {}
        node.meta["example_value"] = self._example(node.target, node.args)

    def _before_repeats(self, operand: Repeated, reader: fx.Node) -> fx.Node:
        """What a k or v was repeated from; it has a new reader then."""
        held = self._holder(operand.slot)
        known = set(held.users)
        new = self._stepped(held, operand.steps, reader)
        self.readers.setdefault(operand.slot, set()).update(set(held.users) - known or {reader})
        return new

    def replace(self, site: Site) -> None:
        graph = self.graph
        anchor = self.nodes[site.q.slot.node]
        with graph.inserting_before(self.nodes[site.before]):
            op = self._call(site)
            results = [self._add(operator.getitem, (op, i), anchor) for i in (0, 1)]
            if site.projection is not None and site.projection.norm is not None:
                self._replace_sum(site.projection.norm, op, anchor)
            for decoded, result in zip((site.q, site.k), results, strict=False):
                if decoded is None or not decoded.stream.keep:
                    continue
                shaped = self._as_value(decoded, result, anchor)
                self._substitute(decoded.slot, shaped)
            if not results[1].users:
                graph.erase_node(results[1])
        for node in site.sunk:
            self.nodes[site.before].prepend(self.nodes[node])
        for call in dict.fromkeys(store.call for store in site.stores()):
            self._remove_store(call)

    def _call(self, site: Site) -> fx.Node:
        q, k, v = site.q, site.k, site.v
        anchor = self.nodes[q.slot.node]
        given = () if site.projection else (q, k)
        operands = [self._operand(d.x, anchor) if d else None for d in given]
        if k is not None and site.is_single():
            operands[0] = self._add("narrow", (operands[0], 2, 0, 0), anchor)
        extras = [
            self._operand(access, anchor) if access else None
            for access in (
                q.weight,
                k.weight if k else None,
                q.bias,
                k.bias if k else None,
                q.scale,
                k.scale if k else None,
                q.cos,
                q.sin,
                q.positions,
            )
        ]
        eps = [self._number(d.eps) if d else 0.0 for d in (q, k)]
        text = site.record.to_text()
        if site.k_store is None:
            args = (*operands, *extras, *eps, text)
            return self._add(torch.ops.fxfuse.norm_rope.default, args, anchor)
        caches = [
            self._cache(store.cache, anchor) if store is not None else None
            for store in (site.k_store, site.v_store)
        ]
        first, second = (*site.slots, None)[:2]
        slots = [self._operand(a, anchor) if a else None for a in (first, second)]
        scales = [self._operand(a, anchor) if a else None for a in site.scales]
        behind = (*extras, *slots, *caches, *scales, *eps, text)
        if site.projection is not None:
            args = (*self._projected(site.projection, anchor), *behind)
            return self._add(torch.ops.fxfuse.project_norm_rope_store_.default, args, anchor)
        value = self._operand(v.x, anchor) if v else None
        args = (*operands, value, *behind)
        return self._add(torch.ops.fxfuse.norm_rope_store_.default, args, anchor)

    def _projected(self, projection: Projection, anchor: fx.Node) -> tuple[fx.Node | None, ...]:
        """x and the norm in front, and three weights and biases."""
        weights, biases = (
            [self._operand(a, anchor) if a else None for a in (*accesses, None, None)[:3]]
            for accesses in (projection.weights, projection.biases)
        )
        x, residual = (
            self._operand(a, anchor) if a else None for a in (projection.x, projection.residual)
        )
        front: tuple[Any, ...] = (None, 0.0)
        if projection.norm is not None:
            normed = projection.norm.normed
            weight = self._operand(normed.weight, anchor) if normed.weight else None
            front = (weight, self._number(normed.eps))
        return x, residual, *front, *weights, *biases

    def replace_norm(self, site: NormSite) -> None:
        normed = site.normed
        anchor = self.nodes[normed.slot.node]
        addends = [self._operand(a, anchor) for a in site.addends]
        with self.graph.inserting_before(self.nodes[site.before]):
            weight = self._operand(normed.weight, anchor) if normed.weight else None
            args = (*(*addends, None, None)[:3], weight, self._number(normed.eps))
            op = self._add(
                torch.ops.fxfuse.add_rms_norm.default, (*args, site.record.to_text()), anchor
            )
            for i, slot in enumerate((site.sum, normed.slot)):
                if slot is not None:
                    new = self._add(operator.getitem, (op, i), anchor)
                    self._replace_row(slot, new, site)

    def _replace_sum(self, site: NormSite, op: fx.Node, anchor: fx.Node) -> None:
        """The sum of a norm in front of a projection becomes the op's third result."""
        if site.sum is not None:
            new = self._add(operator.getitem, (op, 2), anchor)
            if new.meta["example_value"].shape != site.sum.shape:
                new = self._add("view", (new, site.sum.shape), anchor)
            self._replace_row(site.sum, new, site)

    def _replace_row(self, slot: Slot, new: fx.Node, site: NormSite) -> None:
        self.rows[slot] = new
        # The op's own nodes may stand before it; they go with the old result.
        self._substitute(slot, new, {self.nodes[n] for n in site.own})

    def _number(self, x: float | Scalar) -> Any:
        return self.nodes[x.node] if isinstance(x, Scalar) else x

    def _holder(self, slot: Slot) -> fx.Node:
        return self.rows.get(slot) or self.nodes[self.holder[slot]]

    def _cache(self, cache: Slot, anchor: fx.Node) -> fx.Node:
        whole, steps = held(cache, self.holder)
        return self._stepped(self._holder(whole), steps, anchor)

    def _operand(self, access: Access, anchor: fx.Node) -> fx.Node:
        return self._stepped(self._holder(access.leaf.slot), access.steps, anchor)

    def _stepped(self, node: fx.Node, steps: tuple[Step, ...], anchor: fx.Node) -> fx.Node:
        for name, *args in steps:
            if name == "view_as_real":
                node = self._add(torch.view_as_real, (node,), anchor)
            else:
                node = self._add(name, (node, *args), anchor)
        return node

    def _as_value(self, decoded: Decoded, result: fx.Node, anchor: fx.Node) -> fx.Node:
        """The op's [B, T, H, D] with the dims of the value it replaces."""
        rank = len(decoded.value.dims)
        axes = [i for i, row in enumerate(decoded.rows) if row is not None]
        for place in reversed([i for i, row in enumerate(decoded.rows) if row is None]):
            result = self._add("select", (result, place, 0), anchor)
        place_of = {decoded.rows[i]: axes.index(i) for i in axes}
        order = (*(place_of[d] for d in range(rank - 1) if d in place_of), len(axes))
        if order != tuple(range(len(order))):
            result = self._add("permute", (result, order), anchor)
        for d in range(rank - 1):
            if d not in place_of:
                result = self._add("unsqueeze", (result, d), anchor)
        if len(pair := decoded.channel_axes) > 1:
            sizes = tuple(decoded.slot.shape[axis] for axis in pair)
            result = self._add("unflatten", (result, -1, sizes), anchor)
        return result

    def _substitute(self, slot: Slot, new: fx.Node, but: Set[fx.Node] = frozenset()) -> None:
        """Every reader of the slot `but` some reads the new node; the nodes that only handed it on
        are dead.

        A user that asks for nothing but metadata (`size`, `type_as`) may stand before the op and
        keeps the old node, whose numbers nobody computes then.
        """
        same = {self.nodes[n] for n in self.named.get(slot, ())}
        readers = self.readers.get(slot, set()) - same - but
        # Where the new node would come too late for them nobody reads them either.
        unread = {node for node in readers if not node.users and node in self.pure}
        readers, self.dead = readers - unread, [*self.dead, *unread]
        for node in same:
            node.replace_all_uses_with(
                new, delete_user_cb=lambda user: user in readers or user.op == "output"
            )
        self.dead += same

    def _remove_store(self, call: Call) -> None:
        """The write's node returns its cache; later readers read the cache itself."""
        node = self.nodes[call.node]
        self.dead += node.all_input_nodes
        if node.users:
            node.replace_all_uses_with(self._holder(call.writes[0]))
        self.graph.erase_node(node)

    def _add(self, target: Any, args: tuple[Any, ...], anchor: fx.Node) -> fx.Node:
        """A new node with the metadata Dynamo's nodes carry."""
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = create(target, args)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in anchor.meta:
                node.meta[key] = anchor.meta[key]
        node.meta["example_value"] = self._example(target, args)
        return node

    def _example(self, target: Any, args: tuple[Any, ...]) -> Any:
        """What the node gives under the fake mode; computed once for equal calls on equal
        metadata.
        """
        values = fx.node.map_arg(args, lambda n: n.meta["example_value"])
        key = (target, fx.node.map_aggregate(values, _metadata))
        if key not in self.examples:
            with self.fake_mode, torch.no_grad(), without_guards(self.fake_mode):
                if isinstance(target, str):
                    self.examples[key] = getattr(values[0], target)(*values[1:])
                else:
                    self.examples[key] = target(*values)
        return self.examples[key]

    def erase(self) -> None:
        """Erase what the rewrite left without users, from the replaced nodes upwards, never a node
        that writes.
        """
        waiting = list(self.dead)
        while waiting:
            node = waiting.pop()
            if node.users or node not in self.pure or node._erased:
                continue
            waiting += node.all_input_nodes
            self.graph.erase_node(node)


def _metadata(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return (type(x), x)
    sizes = tuple(map(size_of, (*x.shape, *x.stride(), x.storage_offset())))
    return sizes, x.dtype, x.device
