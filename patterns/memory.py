"""Whether a fused op may stand where it is planned: order, versions of storages, regions."""

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from fxfuse.patterns.access import Refused
from fxfuse.patterns.frontier import Uses
from fxfuse.patterns.held import held
from fxfuse.patterns.read import Reading
from fxfuse.patterns.site import Access, Decoded, StoreWrite
from fxfuse.slots import Scalar, Slot


class Memory:
    """Writes and reads of storages by position in the model's graph."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.index = {node: i for i, node in enumerate(reading.view.graph.nodes)}
        calls = reading.view.calls
        self.writes = {
            storage: [self.index[calls[p].node] for p in positions]
            for storage, positions in reading.writes.items()
        }
        self.touches: dict[int, list[fx.Node]] = {}
        for call in calls:
            if reading.relations.get(call) == "view":
                # Whoever reads or writes through a view names its storage too.
                continue
            for slot in (*call.inputs(), *call.outs):
                self.touches.setdefault(slot.storage, []).append(call.node)

    def version(self, storage: int, before: fx.Node) -> int:
        """How often a storage has been written by the nodes before one."""
        return sum(w < self.index[before] for w in self.writes.get(storage, ()))

    def check(
        self,
        streams: list[Decoded],
        operands: Iterable[Access],
        stores: list[StoreWrite],
        before: fx.Node,
        holder: Mapping[Slot, fx.Node],
    ) -> None:
        """Raises Refused if an op before `before` would read or write other memory than the model's
        own calls.
        """
        here = self.index[before]
        for access in operands:
            slot = access.leaf.slot
            node = slot.node if isinstance(slot, Scalar) else holder[slot]
            if self.index[node] >= here:
                raise Refused(f"{node.name} is computed after the first use of the result")
            if isinstance(slot, Slot):
                self._check_version(slot, access.leaf.version, before)
        for decoded in streams:
            self.check_region(decoded.slot.node, before)
        for store in stores:
            self._check_store(store, stores, before, holder)

    def _check_version(self, slot: Slot, version: int, before: fx.Node) -> None:
        if self.version(slot.storage, before) != version:
            raise Refused(f"{slot.node.name} is written between its use and the fused op")

    def check_unwritten(self, slot: Slot, readers: Iterable[fx.Node], uses: Uses) -> None:
        """Raises Refused where a result is written, before its last reader, through a tensor that
        is no view of it: the op's result would stay as it was.
        """
        reading, own, waiting = self.reading, {slot}, [slot]
        while waiting:
            for call in uses.consumers.get(waiting.pop(), []):
                if reading.relations.get(call) == "view" or slot in call.writes:
                    waiting += [s for s in call.outs if s not in own]
                    own.update(call.outs)
        made = self.index[uses.holder[slot]]
        last = max((self.index[reader] for reader in readers), default=made)
        for position in reading.writes.get(slot.storage, ()):
            call = reading.view.calls[position]
            if made < self.index[call.node] < last and not own.issuperset(call.writes):
                raise Refused("a result that is written before its last reader")

    def check_region(self, start: fx.Node, end: fx.Node) -> None:
        """No op may leave the grad mode it was written in. It may leave an autocast region: what
        autocast does is in the calls the lens saw, and to the op and its views it does nothing.
        """
        node = start
        while node is not end and node.op != "root":
            if node.target is torch._C._set_grad_enabled:
                raise Refused(f"{node.name} begins or ends a region in between")
            node = node.next

    def _check_store(
        self,
        store: StoreWrite,
        stores: list[StoreWrite],
        before: fx.Node,
        holder: Mapping[Slot, fx.Node],
    ) -> None:
        own = {s.call.node for s in stores}
        start, end = self.index[store.call.node], self.index[before]
        for node in self.touches.get(store.cache.storage, ()):
            if node not in own and start < self.index[node] < end:
                raise Refused(f"{node.name} touches the cache between its store and the fused op")
        whole, _ = held(store.cache, holder)
        is_read = store.call.node.users and store.call.writes[0] not in holder
        if self.index[holder[whole]] >= end or is_read:
            raise Refused("the cache is not at hand")
