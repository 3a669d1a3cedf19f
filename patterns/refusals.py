"""Refusals of a plan: why values and cache writes that were found stay the model's.

In come the reading, the frontier and its stores, and what the plan made of them; out comes a
`Refusal` for each that a user would look for.
"""

from collections.abc import Mapping, Sequence, Set

import torch

from fxfuse.patterns.frontier import Frontier
from fxfuse.patterns.read import Reading
from fxfuse.patterns.site import Decoded, Gate, Refusal, Site, location
from fxfuse.patterns.storing import Stores
from fxfuse.slots import Call, Slot

aten = torch.ops.aten


class Refusals:
    """`told`, in the order of the graph."""

    def __init__(self, reading: Reading, frontier: Frontier, stores: Stores) -> None:
        self.reading, self.stores = reading, stores
        self.uses, self.absorbed = frontier.uses, frontier.absorbed
        self.told: list[Refusal] = []

    def tell_values(
        self, refused: Mapping[Slot, tuple[str, str]], made: Set[Slot], gate: Gate
    ) -> None:
        """One refusal for each rotated value that no site makes; what a site makes otherwise is no
        refusal, nor is a norm that the gate leaves.
        """
        reported: set[Slot] = set()
        for slot, (stage, reason) in refused.items():
            below = self._below(slot)
            if below & made or any(slot in self._below(other) for other in reported):
                continue
            if stage == "norm" and gate(stage, slot, None, None):
                continue
            reported.add(slot)
            self.told.append(Refusal(stage, slot.node.name, reason, location(slot.node)))

    def tell_writes(self, sites: Sequence[Site]) -> None:
        """Why cache writes of what the sites make stay the model's."""
        taken = [store for site in sites for store in site.stores()]
        for site in sites:
            if site.k_store is None:
                self._tell_writes_of(site.k or site.q)
            elif site.v_store is None:
                for store in self.stores.beside(site.k_store, taken)[:1]:
                    self._tell(store.call, self.stores.reasons.get(store.call))

    def _tell_writes_of(self, decoded: Decoded) -> None:
        """A joint with other tokens of this graph is no cache write, nor is what is written over
        the stream's own source.
        """
        source = decoded.x.leaf.slot
        behind = self.stores.behind.get(decoded.slot, ())
        for call in dict.fromkeys([*self._final_consumers(decoded.slot), *behind]):
            reason = self.stores.reasons.get(call) or self.stores.refused.get(call)
            if call.op == aten.cat.default:
                grows = any(self.stores.origin(slot).call is None for slot in call.inputs())
                grows = grows and call not in self.stores.joints
                reason = "a cache that grows by cat is made anew, not written to" if grows else None
            elif reason is None and any(w.storage != source.storage for w in call.writes):
                why = self.reading.view.opaque.get(call.node)
                reason = f"the call {why}" if why else f"{call.op} is no cache write that is known"
            self._tell(call, reason)

    def _tell(self, call: Call, reason: str | None) -> None:
        if reason is not None:
            node = call.node
            self.told.append(Refusal("store", node.name, reason, location(node)))

    def _final_consumers(self, slot: Slot) -> list[Call]:
        """The calls that read a result, seen through views."""
        found = []
        for call in self.uses.consumers.get(slot, []):
            if call in self.absorbed:
                continue
            through = self.reading.relations.get(call) == "view"
            found += [c for o in call.outs for c in self._final_consumers(o)] if through else [call]
        return found

    def _below(self, slot: Slot) -> set[Slot]:
        """The slots a value was made from, through calls that were read."""
        seen: set[Slot] = set()
        waiting = [slot]
        while waiting:
            call = waiting.pop().call
            if call is None or call not in self.reading.relations:
                continue
            new = [s for s in call.inputs() if s not in seen]
            seen.update(new)
            waiting += new
        return seen
