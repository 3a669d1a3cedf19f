"""The norm in front of a projection, with the sum that it is taken of.

In: a projected site, whose x may be the norm of a sum of two tensors. Out: the same site from those
two on, where only its products read the norm; or the site as it came, and why where there is such
a sum: no loss, as the compiler norms in one kernel with whatever stands before.
"""

import dataclasses
from collections.abc import Set

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.add_norm import Norms
from fxfuse.patterns.frontier import Uses
from fxfuse.patterns.memory import Memory
from fxfuse.patterns.read import Reading
from fxfuse.patterns.site import Access, Gate, Left, NormSite, Projection, Site, Step, location
from fxfuse.slots import Call, Slot

aten = torch.ops.aten

KIND = "input_norm"
# What no compiler makes in one kernel with a sum: it is in memory anyway.
PRODUCTS = frozenset(
    {aten.linear.default, aten.mm.default, aten.addmm.default, aten.bmm.default}
    | {aten.baddbmm.default, aten.matmul.default}
)


class InputNorms:
    """Projected sites with the norms in front of them taken in; and those that stay, with why."""

    def __init__(
        self, reading: Reading, uses: Uses, memory: Memory, norms: Norms, gate: Gate
    ) -> None:
        self.reading, self.uses, self.memory = reading, uses, memory
        self.norms, self.gate = norms, gate
        self.left: list[Left] = []

    def grown(self, site: Site, products: Set[Call | None]) -> Site:
        """The site with the norm in front of its products, or as it is."""
        projection = site.projection
        assert projection is not None
        x: Slot = projection.x.leaf.slot
        norm = self.norms.of(self.reading.viewed(x))
        if norm is None or len(norm.addends) != 2:
            return site
        record = dataclasses.replace(site.record, front=norm.record)
        reason = self._stays(norm, x, products)
        if reason := reason or self.gate(KIND, site.q.slot, site.rows, record):
            return self._left(site, norm, reason)
        first, second = (_with_rows_of(a, projection.x) for a in norm.addends)
        new = dataclasses.replace(projection, x=first, residual=second, norm=norm)
        if reason := self._misfit(new, norm, site):
            return self._left(site, norm, reason)
        self.norms.taken.add(norm.normed.slot)
        return dataclasses.replace(site, record=record, projection=new)

    def _left(self, site: Site, norm: NormSite, reason: str) -> Site:
        node = norm.normed.slot.node
        self.left.append(Left(KIND, reason, node.name, location(node)))
        return site

    def _stays(self, norm: NormSite, x: Slot, products: Set[Call | None]) -> str:
        """Why a norm is none that the op makes, or ""."""
        slots = [x, norm.normed.slot, *(a.leaf.slot for a in norm.addends)]
        alike = all(slot.dtype == x.dtype and slot.is_dense() for slot in slots)
        if not alike or x.shape[-1] != norm.record.channels:
            return "its rows, or the sum's, are not those of the projection as they lie in memory"
        if not self._readers(norm.normed.slot) <= products:
            return "others read the normed rows too"
        if not self._pays(norm):
            return "a term of its sum is made for the sum alone, in one kernel with it"
        return ""

    def _pays(self, norm: NormSite) -> bool:
        """Whether both terms of the sum are in memory anyway: what a kernel makes for the sum alone
        the compiler makes, adds up and norms in one.
        """
        own = norm.normed.x.leaf.slot.call
        made = [self.reading.viewed(a.leaf.slot) for a in norm.addends]
        return all(
            slot.call is None or slot.call.op in PRODUCTS or self._readers(slot) - {own}
            for slot in made
        )

    def _misfit(self, projection: Projection, norm: NormSite, site: Site) -> str:
        """Why the op, where it stands, lacks an operand, or comes behind a use of the sum."""
        total: Slot = norm.normed.x.leaf.slot
        index, here = self.memory.index, site.before
        readers = {call.node for call in self.uses.consumers.get(total, [])} - norm.own
        if any(index[reader] < index[here] for reader in readers):
            return "the sum is used before the projection"
        try:
            self.memory.check([], projection.accesses(), [], here, self.uses.holder)
            self.memory.check_region(total.node, here)
        except Refused as refusal:
            return str(refusal)
        return ""

    def _readers(self, slot: Slot) -> set[Call | None]:
        """The calls that read a tensor, through views too; None is the graph's end."""
        found: set[Call | None] = {None} if slot in self.uses.returned else set()
        for call in self.uses.consumers.get(slot, []):
            if self.reading.relations.get(call) == "view":
                found = found.union(*map(self._readers, call.outs))
            else:
                found.add(call)
        return found


def _with_rows_of(addend: Access, x: Access) -> Access:
    """A term of a sum as [B, T, hidden], as x is made."""
    shape = x.steps[0][1] if x.steps else x.leaf.shape
    steps: tuple[Step, ...] = () if addend.leaf.shape == shape else (("reshape", shape),)
    return Access(addend.leaf, steps)
