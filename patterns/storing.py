"""Storing: which cache writes join the site of which streams, and what the op needs for it."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from fxfuse.patterns.access import Refused
from fxfuse.patterns.cut import NOTHING, origin_of
from fxfuse.patterns.disjoint import are_disjoint
from fxfuse.patterns.held import VIEWS
from fxfuse.patterns.parted import JOINTS, parted
from fxfuse.patterns.placing import Placed, placed, scale_access, slots_access, stored_copy
from fxfuse.patterns.read import PROJECTIONS, Reading
from fxfuse.patterns.record import Layout, Store
from fxfuse.patterns.site import Access, Decoded, StoreWrite
from fxfuse.slots import Call, Slot

# Of how many tensors the indices of a site may be made.
MAX_ROOTS = 2


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a site's stores add to it: the record, v as a stream, and operands."""

    record: Store
    v: Decoded | None
    slots: tuple[Access, ...]
    scales: tuple[Access | None, Access | None]

    def accesses(self) -> list[Access]:
        return [*self.slots, *(a for a in self.scales if a is not None)]


class Stores:
    """The cache writes of a graph by the streams they store, and why others are none."""

    def __init__(
        self,
        reading: Reading,
        found: list[StoreWrite],
        refused: dict[Call, str],
        streams: Iterable[Decoded],
        normed: Mapping[Slot, Decoded],
    ) -> None:
        self.reading, self.normed = reading, normed
        self.ends = {d.slot for d in streams}
        self.reasons: dict[Call, str] = {}
        self.refused = refused
        self.writes = [part for store in found for part in self._parted(store)]
        self.joints = {store.joint for store in self.writes}
        self.behind: dict[Slot, list[Call]] = {}
        self.stored_from: dict[Slot, list[StoreWrite]] = {}
        for call in refused:
            for slot in call.inputs():
                self._note(call, slot)
        for store in self.writes:
            origin = self.origin(store.value, store.through)
            self.stored_from.setdefault(origin, []).append(store)
            if self._note(store.call, origin) and (store.joint or origin not in self.ends):
                made = f"stored rows that {origin.call.op} makes" if origin.call else "stored rows"
                self.reasons.setdefault(store.call, f"{made} of the rotated ones")

    def _parted(self, store: StoreWrite) -> Sequence[StoreWrite]:
        """The writes of a stream's rows and of others that are joined; rows that are a join
        themselves, of a stream or of a v, are whole.
        """
        parts = [store] if self._is_of_stream(store) else parted(self.reading, store)
        return parts if any(map(self._is_of_stream, parts)) else [store]

    def _is_of_stream(self, store: StoreWrite) -> bool:
        return self.origin(store.value, store.through) in self.ends

    def _note(self, call: Call, value: Slot) -> bool:
        """Note a write behind the streams' ends that a value is computed of by row, whatever stands
        between; whether there are any.
        """
        ends, seen, waiting = set(), set(), [value]
        while waiting:
            slot = waiting.pop()
            made = slot.call
            if slot in self.ends:
                ends.add(slot)
            elif made is not None and made not in seen and made.op not in PROJECTIONS:
                seen.add(made)
                waiting += made.inputs() if made.op in JOINTS else made.inputs()[:1]
        for end in ends:
            self.behind.setdefault(end, []).append(call)
        self.joints |= {made for made in seen if made.op in JOINTS}
        return bool(ends)

    def origin(self, slot: Slot, through: Mapping[Call, Slot] = NOTHING) -> Slot:
        """The stream's end, or the tensor, that views make a slot of."""
        return origin_of(self.reading, slot, through, self.ends)

    def of(self, decoded: Decoded) -> StoreWrite | None:
        """The cache write of a stream's result, seen through views."""
        for store in self.stored_from.get(decoded.slot, ()):
            try:
                self._placed(store, decoded)
            except Refused as reason:
                self.reasons[store.call] = str(reason)
                continue
            return store
        return None

    def _placed(self, store: StoreWrite, decoded: Decoded) -> Placed:
        return placed(self.reading, store, decoded, store.roots)

    def partner(
        self, k: Decoded, k_store: StoreWrite, free: Iterable[StoreWrite]
    ) -> StoreWrite | None:
        """v's store: the nearest one at the same slots, into other memory, of a value that is a
        view of a projection, or its norm.
        """
        for store in free:
            if store.negative != k_store.negative:
                reason = f"slots below 0 are {store.negative} where those of k are "
                reason += k_store.negative
            elif store.skipped != k_store.skipped:
                reason = f"slot {store.skipped} is skipped where those of k skip {k_store.skipped}"
            else:
                try:
                    self._v(k, self._placed(k_store, k), k_store.roots, store)
                    return store
                except Refused as error:
                    reason = str(error)
            self.reasons.setdefault(store.call, reason)
        return None

    def _v(
        self, k: Decoded, where: Placed, roots: Sequence[Slot], store: StoreWrite
    ) -> tuple[Decoded, Layout]:
        """v as a stream, and its cache's layout. Raises Refused."""
        v = self.normed.get(self.origin(store.value, store.through))
        if v is None:
            copy = stored_copy(self.reading, store, where, roots, _sizes(k))
            if copy is None:
                raise Refused("stored rows that are no view of a tensor of the graph")
            return copy
        if k.stream.norm is None:
            raise Refused("rows that are normed where those of k are not")
        if v.eps != k.eps:
            raise Refused("rows that are normed with another eps than those of k")
        its = placed(self.reading, store, v, roots)
        if its.flat != where.flat or _sizes(v) != _sizes(k):
            raise Refused("normed rows of other tokens than those of k")
        stream = dataclasses.replace(v.stream, keep=False)
        return dataclasses.replace(v, stream=stream), its.layout

    def beside(self, k_store: StoreWrite, taken: Iterable[StoreWrite]) -> list[StoreWrite]:
        """The free stores at the slots of k's, into other memory, the nearest first."""
        at, taken = self.reading.positions, {k_store, *taken}
        free = [s for s in self.writes if s not in taken and {*s.roots} == {*k_store.roots}]
        free = [s for s in free if self._is_elsewhere(s.cache, k_store.cache)]
        return sorted(free, key=lambda s: abs(at[s.call] - at[k_store.call]))

    def _is_elsewhere(self, cache: Slot, other: Slot) -> bool:
        """Whether two caches have no memory in common. Parts of one tensor of the graph may lie in
        one storage; of two that come into the graph so, functionalisation would copy both.
        """
        if cache.storage != other.storage:
            return True
        return self._whole(cache) is self._whole(other) and are_disjoint(cache, other)

    def _whole(self, slot: Slot) -> Slot:
        """The tensor that a slot is a view of, or the slot itself."""
        view = self.reading.relations
        while slot.call is not None and (view.get(slot.call) == "view" or slot.call.op in VIEWS):
            slot = slot.call.inputs()[0]
        return slot

    def joined(self, k: Decoded, k_store: StoreWrite, v_store: StoreWrite | None) -> Stored:
        """What the stores of k (and v) add to a site. Raises Refused."""
        own = [s for s in (k_store, v_store) if s is not None]
        for store in self.writes:
            if store not in own and any(store.call is s.call for s in own):
                raise Refused(f"{store.call.op} stores k and v, of which one cannot join")
        roots, sizes = k_store.roots, _sizes(k)
        if len(roots) > MAX_ROOTS:
            raise Refused(f"indices made of {len(roots)} tensors, at most {MAX_ROOTS} are read")
        where = self._placed(k_store, k)
        v, layout = None, where.layout
        if v_store is not None:
            v, layout = self._v(k, where, roots, v_store)
        slots = tuple(slots_access(self.reading, own, root, where.flat, sizes) for root in roots)
        scales = [
            scale_access(self.reading, store, letters.axes, where.flat) if store else None
            for store, letters in ((k_store, where.layout), (v_store, layout))
        ]
        record = Store(where.layout, layout, k_store.negative, k_store.skipped)
        return Stored(record, v, slots, (scales[0], scales[1]))


def _sizes(decoded: Decoded) -> tuple[object, object]:
    """Batch rows and tokens."""
    b, t = (1 if r is None else decoded.slot.shape[r] for r in decoded.rows[:2])
    return b, t
