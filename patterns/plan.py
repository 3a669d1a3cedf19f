"""Plan: decoded streams joined into sites, one op each, where memory allows it.

q and k of the frontier that read the same tables are joined, and the cache writes of k and v with
them. A fused op stands after its last input and before its first consumer; nothing in between
may write what it reads, or touch what it stores to.
"""

import dataclasses
from collections.abc import Container, Iterable

import torch
from torch import fx

from fxfuse.patterns.access import Refused
from fxfuse.patterns.add_norm import Norms
from fxfuse.patterns.attention import (
    ATTENTION,
    normed_operands,
    operand_index,
    stored_statistics,
)
from fxfuse.patterns.frontier import Frontier
from fxfuse.patterns.grouped import Groups
from fxfuse.patterns.lookup import with_lookups
from fxfuse.patterns.memory import Memory
from fxfuse.patterns.projection import Projections
from fxfuse.patterns.read import Reading
from fxfuse.patterns.record import Record
from fxfuse.patterns.refusals import Refusals
from fxfuse.patterns.site import (
    Access,
    Decoded,
    Gate,
    GroupedSite,
    Left,
    NormSite,
    Refusal,
    Site,
    StoreWrite,
    fuse_all,
    location,
)
from fxfuse.patterns.stores import find_stores
from fxfuse.patterns.storing import Stored, Stores
from fxfuse.slots import Call, Scalar, Size, Slot

aten = torch.ops.aten


@dataclasses.dataclass
class Plan:
    """What to rewrite, what was refused, what was disproved (each of those a bug of fxfuse), and
    what the gate leaves to the compiler.
    """

    sites: list[Site]
    refusals: list[Refusal]
    disproved: list[str] = dataclasses.field(default_factory=list)
    norms: list[NormSite] = dataclasses.field(default_factory=list)
    groups: list[GroupedSite] = dataclasses.field(default_factory=list)
    left: list[Left] = dataclasses.field(default_factory=list)


class _Planner:
    def __init__(self, reading: Reading, store: bool, training: bool, gate: Gate) -> None:
        self.reading, self.gate = reading, gate
        found, no_stores = find_stores(reading)
        readers, normed = normed_operands(reading, found), stored_statistics(reading, found)
        casts = {c for write in found for c in write.through}
        frontier = self.frontier = Frontier(
            reading, readers, () if training or not store else normed, casts, training=training
        )
        self.uses, self.absorbed = frontier.uses, frontier.absorbed
        self.streams, self.refused = frontier.streams, frontier.refused
        self.memory = Memory(reading)
        self.may_store = store and not training
        self.plan = Plan([], [], frontier.disproved)
        self.stores = Stores(reading, found, no_stores, self.streams, frontier.stored_norms)
        self.calls_of: dict[fx.Node, list[Call]] = {}
        for call in reading.view.calls:
            self.calls_of.setdefault(call.node, []).append(call)

    def run(self) -> Plan:
        self.streams.sort(key=lambda d: self.memory.index[self.uses.holder[d.slot]])
        waiting = list(self.streams)
        while waiting:
            first = waiting.pop(0)
            partner = next((d for d in waiting if self._joinable(first, d)), None)
            if partner is not None and (site := self._site(first, partner)):
                waiting.remove(partner)
            else:
                site = self._site(first, None)
            if site is not None:
                self.plan.sites.append(site)
        self._tell_keys()
        made = {d.slot for site in self.plan.sites for d in site.streams()}
        for slot, decoded in self.frontier.stored_norms.items():
            if slot not in made:
                self.frontier.release(decoded)
        sites = [site for site in self.plan.sites if not self._is_left(site)]
        holder, disproved = self.uses.holder, self.plan.disproved
        sites = with_lookups(sites, self.memory, holder, disproved)
        norms = Norms(self.reading, self.frontier, self.memory, self.gate)
        projections = Projections(
            self.reading, self.uses, self.absorbed, self.memory, norms, self.gate
        )
        self.plan.sites = [projections.grown(site) for site in sites]
        left_out = Refusals(self.reading, self.frontier, self.stores)
        left_out.tell_values(self.refused, made, self.gate)
        if self.may_store:
            left_out.tell_writes(self.plan.sites)
        norms.decide()
        groups = Groups(self.reading, self.frontier, self.gate)
        self.plan.norms, self.plan.groups = norms.sites, groups.sites
        self.plan.left += norms.left + groups.left + projections.left
        self.plan.refusals += left_out.told
        self.plan.refusals += norms.refusals + groups.refusals + projections.refusals
        self.plan.disproved += norms.disproved
        return self.plan

    def _is_left(self, site: Site) -> bool:
        """Whether the gate leaves a site to the compiler."""
        kind = "norm" if site.record.q.rotation is None else "attention"
        slot = site.q.slot
        reason = self.gate(kind, slot, site.rows, site.record)
        if reason:
            self.plan.left.append(Left(kind, reason, slot.node.name, location(slot.node)))
        return bool(reason)

    def _tell_keys(self) -> None:
        """One attention is one site of the kind "attention", also where q and k do not join."""
        sites = self.plan.sites
        for i in range(1, len(sites)):
            site, other = sites[i - 1], sites[i]
            alone = site.is_single() and other.is_single() and site.kind == other.kind
            if alone and self._is_key(other.q) != self._is_key(site.q):
                sites[i] = dataclasses.replace(other, kind="key")

    def _is_key(self, decoded: Decoded) -> bool:
        return self._operand_of_attention(decoded) == 1 or self.stores.of(decoded) is not None

    def _joinable(self, a: Decoded, b: Decoded) -> bool:
        """Streams of one attention, of as many tokens: they turn by the same rows of the same
        tables; or it reads them unrotated, one as q and one as k.
        """
        if _row_sizes(a) != _row_sizes(b) or a.value.dtype != b.value.dtype:
            return False
        if a.stream.rotation is None or b.stream.rotation is None:
            (call, i), (other, j) = (self.frontier.reader_of.get(d.slot, (None, 0)) for d in (a, b))
            return call is not None and call is other and i != j
        return a.cos == b.cos and a.sin == b.sin

    def _site(self, a: Decoded, b: Decoded | None) -> Site | None:
        """The site of one or two streams with as many stores as memory allows; None if it allows no
        site.
        """
        q, k = self._roles(a, b)
        k_store = self.stores.of(k) if k is not None and self.may_store else None
        v_store = None
        if k is not None and k_store is not None:
            v_store = self.stores.partner(k, k_store, self._beside(k_store))
        if k_store and (site := self._stored(q, k, k_store, v_store)):
            return site
        if k_store and b is not None and k is not None and self._stored(k, k, k_store, v_store):
            return None
        try:
            return self._place(a if b is None else q, None if b is None else k, None, None)
        except Refused as reason:
            if b is None:
                self.refused[a.slot] = ("plan", str(reason))
        return None

    def _stored(
        self, q: Decoded, k: Decoded | None, k_store: StoreWrite, v_store: StoreWrite | None
    ) -> Site | None:
        """The site with its stores, with k's alone where v's cannot join and is another call."""
        both = v_store is not None and v_store.call is k_store.call
        for v in dict.fromkeys((v_store,) if both else (v_store, None)):
            try:
                return self._place(q, k, k_store, v)
            except Refused as reason:
                self.stores.reasons |= {s.call: str(reason) for s in (k_store, v) if s}
        return None

    def _roles(self, a: Decoded, b: Decoded | None) -> tuple[Decoded, Decoded | None]:
        if b is None:
            return a, (a if self.stores.of(a) else None)
        if self.stores.of(a) and not self.stores.of(b):
            return b, a
        if self._operand_of_attention(a) == 1 or self._operand_of_attention(b) == 0:
            return b, a
        return a, b

    def _operand_of_attention(self, decoded: Decoded) -> int | None:
        """Which operand of attention (or of a matmul) the stream's result becomes through views,
        repeats and joints with other tokens.
        """
        waiting, seen = [decoded.slot], set()
        while waiting:
            slot = waiting.pop()
            for call in self.uses.consumers.get(slot, []):
                if call.op in ATTENTION:
                    return operand_index(call, slot)
                read = call in self.reading.relations or call.op == aten.cat.default
                if read and call not in seen:
                    seen.add(call)
                    waiting += call.outs
        return None

    def _beside(self, k_store: StoreWrite) -> list[StoreWrite]:
        return self.stores.beside(k_store, (s for site in self.plan.sites for s in site.stores()))

    def _place(
        self,
        q: Decoded,
        k: Decoded | None,
        k_store: StoreWrite | None,
        v_store: StoreWrite | None,
    ) -> Site:
        stores = [s for s in (k_store, v_store) if s is not None]
        streams = [s for s in (q, k) if s is not None]
        stored: Stored | None = None
        if k is not None and k_store is not None:
            stored = self.stores.joined(k, k_store, v_store)
            streams += [stored.v] if stored.v else []
        q = self._kept(q, None) if q is not k else _without_heads(q)
        k = self._kept(k, k_store) if k is not None else None
        results = [s for s in (q, k) if s is not None and s.stream.keep]
        operands = [a for d in streams for a in d.accesses()]
        operands += stored.accesses() if stored else []
        before, sunk = self._position(operands, results, stores)
        self.memory.check(streams, operands, stores, before, self.uses.holder)
        v = stored.v if stored else None
        record = Record(
            q.stream,
            k.stream if k else None,
            v.stream if v else None,
            stored.record if stored else None,
        )
        kind = "norm" if record.q.rotation is None else "attention"
        site = Site(record, q, k, v, k_store, v_store, before, sunk, kind)
        if stored is None:
            return site
        return dataclasses.replace(site, slots=stored.slots, scales=stored.scales)

    def _kept(self, decoded: Decoded, store: StoreWrite | None) -> Decoded:
        """keep=False where the cache alone receives the result."""
        keep = store is None or self._is_read_beside(decoded.slot, store)
        return dataclasses.replace(decoded, stream=dataclasses.replace(decoded.stream, keep=keep))

    def _is_read_beside(self, slot: Slot, store: StoreWrite) -> bool:
        consumers, _ = self._consumers(slot, store.handed_on)
        return any(node is not store.call.node for node in consumers)

    def _consumers(
        self, slot: Slot, through: Container[Call] = ()
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes outside the site that read a slot, and the pure views through which they do;
        the calls of `through` count as views.
        """
        consumers, views = [], []
        if slot in self.uses.returned:
            consumers.append(self.uses.output)
        for call in self.uses.consumers.get(slot, []):
            if call in self.absorbed:
                continue
            if not self._hands_on(call.node, through):
                consumers.append(call.node)
                continue
            views.append(call.node)
            for out in call.outs:
                more, seen = self._consumers(out, through)
                consumers += more
                views += seen
        return consumers, views

    def _hands_on(self, node: fx.Node, through: Container[Call]) -> bool:
        """Whether a node is nothing but views, the calls of `through` among them."""
        view = self.reading.relations
        return all(view.get(c) == "view" or c in through for c in self.calls_of[node])

    def _position(
        self, operands: list[Access], results: Iterable[Decoded], stores: list[StoreWrite]
    ) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """The node the op is inserted before: the site's last store, or where its operands are at
        hand if that is later; without a store the first consumer of its results. And the views of
        its results that must move behind it.
        """
        slots = [a.leaf.slot for a in operands]
        if not all(isinstance(s, Scalar) or s in self.uses.holder for s in slots):
            raise Refused("an operand that no node of the graph holds")
        ready = max(
            (s.node if isinstance(s, Scalar) else self.uses.holder[s] for s in slots),
            key=self.memory.index.__getitem__,
        ).next
        index = self.memory.index
        own = {s.call.node for s in stores}
        through = {call for s in stores for call in s.handed_on}
        consumers, views = [], []
        for decoded in results:
            more, seen = self._consumers(decoded.slot, through)
            consumers += [c for c in more if c not in own]
            views += seen
            self.memory.check_unwritten(decoded.slot, more, self.uses)
        if stores:
            before = max(*own, ready, key=index.__getitem__)
        elif not consumers and not views:
            raise Refused("a result that nobody reads")
        else:
            before = min([*consumers, *views], key=index.__getitem__)
        if any(index[c] < index[before] for c in consumers):
            raise Refused("a result that is read before it is stored")
        early = {v for v in views if index[v] < index[before]}
        return before, tuple(sorted(early, key=index.__getitem__))


def _without_heads(k: Decoded) -> Decoded:
    """The q of a site that is a k alone: as k, and nothing of it is computed. Of operands that
    differ by head it sees no head either. Raises Refused where that is a table, which k shares.
    """
    turn = k.stream.rotation
    if turn is not None and turn.by_head:
        raise Refused("a k alone that is turned by tables of each head")
    weight, scale = k.weight, k.scale
    if weight is not None and any(name == "unflatten" for name, *_ in weight.steps):
        weight = dataclasses.replace(weight, steps=(*weight.steps, ("narrow", 0, 0, 0)))
    if scale is not None:
        scale = dataclasses.replace(scale, steps=(*scale.steps, ("narrow", 2, 0, 0)))
    stream = dataclasses.replace(k.stream, keep=False)
    return dataclasses.replace(k, stream=stream, weight=weight, scale=scale)


def _row_sizes(decoded: Decoded) -> list[Size]:
    """Batch and tokens."""
    return [1 if r is None else decoded.slot.shape[r] for r in decoded.rows[:2]]


def plan(
    reading: Reading, *, store: bool = True, training: bool = False, gate: Gate = fuse_all
) -> Plan:
    """Plan the sites of a graph.

    store=False leaves every cache write to the model; so does training=True, and a stream that the
    op has no gradient for is refused. The gate says what is left to the compiler.
    """
    return _Planner(reading, store, training, gate).run()
