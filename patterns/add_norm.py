"""Norms over the hidden width, with the residual sums in front of them, read into `NormSite`s.

y = h * rsqrt(mean(h * h) + eps) * (weight | 1 + weight) of a tensor h; where h = x + r (+ s) is a
plain sum, the site makes that too, and returns it if anybody else reads it.
"""

import logging
from collections.abc import Iterator

import torch

from fxfuse import reference
from fxfuse.patterns.access import Refused
from fxfuse.patterns.frontier import Frontier
from fxfuse.patterns.memory import Memory
from fxfuse.patterns.norms import Statistic, base_of, read_statistic, rows_of, without_offset
from fxfuse.patterns.prove import Disproved, Untried, prove
from fxfuse.patterns.read import Reading
from fxfuse.patterns.record import AddNorm, Norm, Pass, Stream
from fxfuse.patterns.site import (
    Access,
    Decoded,
    Gate,
    Left,
    NormSite,
    Refusal,
    Step,
    location,
    rows_count,
)
from fxfuse.patterns.value import Factor, Index, Kind, Leaf, Size, Value, is_statistic
from fxfuse.slots import Call, Scalar, Slot

aten = torch.ops.aten
log = logging.getLogger(__name__)

KIND = "add_rms_norm"

# For a value of two, three or four axes: which is the op's batch, token and head axis, and the
# views that give it all three.
_ROWS: dict[int, tuple[tuple[int | None, int | None, int | None], tuple[Step, ...]]] = {
    2: ((None, 0, None), (("unsqueeze", 0), ("unsqueeze", 2))),
    3: ((0, 1, None), (("unsqueeze", 2),)),
    4: ((0, 1, 2), ()),
}


class Norms:
    """The norms of a graph: sites, those left to the compiler, refusals, and disproved ones; those
    in `taken` are part of another site.
    """

    def __init__(self, reading: Reading, frontier: Frontier, memory: Memory, gate: Gate) -> None:
        self.reading, self.frontier, self.memory = reading, frontier, memory
        self.uses, self.gate = frontier.uses, gate
        self.candidates = {slot: (value, row) for slot, value, row in _candidates(frontier)}
        self.read: dict[Slot, NormSite | str] = {}
        self.taken: set[Slot] = set()
        self.sites: list[NormSite] = []
        self.left: list[Left] = []
        self.refusals: list[Refusal] = []
        self.disproved: list[str] = []

    def decide(self) -> None:
        """Every norm that is no part of another site is a site, left, or refused."""
        for slot in (s for s in self.candidates if s not in self.taken):
            node = slot.node
            if reason := self.gate(KIND, slot, rows_count(slot.shape[:-1]), None):
                self.left.append(Left(KIND, reason, node.name, location(node)))
            elif isinstance(found := self._found(slot), str):
                self.refusals.append(Refusal("norm", node.name, found, location(node)))
            else:
                self.sites.append(found)
        self.sites.sort(key=lambda site: self.memory.index[site.before])

    def of(self, slot: Slot) -> NormSite | None:
        """The norm that a slot is the result of, if any that can be a site."""
        found = self._found(slot) if slot in self.candidates else None
        return found if isinstance(found, NormSite) else None

    def _found(self, slot: Slot) -> NormSite | str:
        """The site of a candidate, or why it is none."""
        if slot not in self.read:
            self.read[slot] = self._tried(slot)
        return self.read[slot]

    def _tried(self, slot: Slot) -> NormSite | str:
        try:
            return self._site(slot, *self.candidates[slot])
        except Disproved as error:
            self.disproved.append(f"{slot.node.name}: {error}")
            return str(error)
        except (Refused, Untried) as error:
            return str(error)
        except Exception as error:
            log.warning("fxfuse: an error of fxfuse, %s is left alone", slot.node, exc_info=True)
            return f"an error of fxfuse: {type(error).__name__}: {error}"

    def _site(self, slot: Slot, value: Value, statistic: Statistic) -> NormSite:
        if slot not in self.uses.holder:
            raise Refused("a result inside one call of the model's graph")
        normed = _decode(slot, value, statistic)
        if self.frontier.training:
            self.frontier.check_gradients(normed)
        prove(normed, _normed_row)
        whole = normed.x.leaf.slot
        assert isinstance(whole, Slot)
        own = self._own_calls(normed)
        parts = self._addends(whole)
        readers = [c for c in self.uses.consumers.get(whole, ()) if c not in own]
        keeps = len(parts) > 1 and (bool(readers) or whole in self.uses.returned)
        record = AddNorm(
            channels=normed.stream.channels,
            norm=_norm_of(normed.stream),
            addends=len(parts),
            keep_sum=keeps,
            dtype=normed.stream.dtype,
        )
        nodes = [c.node for c in self.uses.consumers.get(slot, ())]
        nodes += [c.node for c in readers] if keeps else []
        before = min([*nodes, self.uses.output], key=self.memory.index.__getitem__)
        site = NormSite(
            record,
            normed,
            tuple(self._access(part) for part in parts),
            whole if keeps else None,
            before,
            frozenset({c.node for c in own} - {c.node for c in readers}),
        )
        self._check(site, whole, joined=len(parts) > 1)
        return site

    def _own_calls(self, normed: Decoded) -> set[Call]:
        """The calls between the op's operands and its result that nobody else needs."""
        own = {normed.slot.call}
        at = self.reading.positions
        for call in sorted(self.frontier.chain(normed), key=at.__getitem__, reverse=True):
            needed = any(
                slot in self.uses.returned or any(c not in own for c in self._consumers(slot))
                for slot in call.outs
            )
            if not needed:
                own.add(call)
        return {c for c in own if c is not None}

    def _consumers(self, slot: Slot) -> list[Call]:
        return self.uses.consumers.get(slot, [])

    def _addends(self, whole: Slot) -> tuple[Slot, ...]:
        """The tensors that a sum adds up, from the left; the tensor itself where it is no sum."""
        terms = _terms(whole)
        if terms is None or not self._is_held(whole, terms):
            return (whole,)
        for inner, other in (terms, terms[::-1]):
            more = _terms(inner)
            alone = self._consumers(inner) == [whole.call] and inner not in self.uses.returned
            # x + x has one consumer too.
            if more and alone and inner is not other and self._is_held(inner, more):
                return (*more, other)
        return terms

    def _is_held(self, total: Slot, terms: tuple[Slot, ...]) -> bool:
        """Whether nodes of the graph hold a sum and its terms, and nobody writes to them."""
        every = (total, *terms)
        return all(s in self.uses.holder and not self._is_written(s) for s in every)

    def _is_written(self, slot: Slot) -> bool:
        return bool(self.reading.writes.get(slot.storage))

    def _access(self, slot: Slot) -> Access:
        return Access(self.reading.leaf(slot.shape, slot.dtype, Kind.DATA, slot), ())

    def _check(self, site: NormSite, whole: Slot, *, joined: bool) -> None:
        """Raises Refused where the op would read other memory than the graph's own calls."""
        operands = [*site.addends, *(a for a in (site.normed.weight,) if a)]
        index, here = self.memory.index, self.memory.index[site.before]
        slots: list[Slot | Scalar] = [a.leaf.slot for a in operands]
        slots += [site.normed.eps] if isinstance(site.normed.eps, Scalar) else []
        for slot in slots:
            node = slot.node if isinstance(slot, Scalar) else self.uses.holder.get(slot)
            if node is None:
                raise Refused("an operand inside one call of the model's graph")
            if index[node] >= here:
                raise Refused(f"{node.name} is computed after the first use of the result")
            if isinstance(slot, Slot) and self._is_written(slot):
                raise Refused(f"{node.name} is memory that the graph writes to")
            if isinstance(slot, Slot) and slot.device != whole.device:
                raise Refused(f"operands on {slot.device} and {whole.device}")
        if self._is_written(site.normed.slot):
            raise Refused("the result is memory that the graph writes to")
        if joined and not whole.is_dense():
            raise Refused("a sum that does not lie row by row in memory")
        nodes = [site.before, site.normed.slot.node, *([whole.node] if joined else [])]
        nodes.sort(key=index.__getitem__)
        self.memory.check_region(nodes[0], nodes[-1])


def _candidates(frontier: Frontier) -> Iterator[tuple[Slot, Value, Statistic]]:
    """The last value of each RMS statistic over the whole last axis of one tensor."""
    seen: set[Leaf] = set()
    for leaf, slot, value in frontier.normed:
        factors = value.terms[0].factors
        sources = [f.leaf for f in factors if f.leaf.kind is Kind.DATA and f.leaf is not leaf]
        others = [f for f in factors if f.leaf.kind is not Kind.DATA]
        plain = len(sources) == 1 and all(f.leaf.kind is Kind.WEIGHT for f in others)
        if leaf in seen or not plain or len(others) > 1 or value.explicit:
            continue
        try:
            statistic = read_statistic(leaf)
        except Refused:
            continue
        whole = statistic.count == sources[0].shape[-1] and not statistic.start
        if statistic.kind == "rms" and statistic.base is sources[0] and whole:
            seen.add(leaf)
            yield slot, value, statistic


def _decode(slot: Slot, value: Value, statistic: Statistic) -> Decoded:
    """The norm as a stream of rows of one head. Raises Refused."""
    term, channels = value.terms[0], value.shape[-1]
    weight = next((f for f in term.factors if f.leaf.kind is Kind.WEIGHT), None)
    row = next(f for f in term.factors if is_statistic(f.leaf))
    x = next(f for f in term.factors if f is not weight and f is not row)
    if len(value.dims) not in _ROWS:
        raise Refused(f"rows of {len(value.dims) - 1} axes")
    if not isinstance(channels, int) or set(term.coefficients) != {1.0} or statistic.scale != 1.0:
        raise Refused("a norm by an unknown width, or with a factor of its own")
    if not isinstance(x.leaf.slot, Slot) or value.shape != x.leaf.shape:
        raise Refused("a norm of a part of a tensor, or of one that no node of the graph holds")
    if not all(map(_walks, x.axes, value.dims, x.leaf.shape)):
        raise Refused("a norm of a tensor that is cut, moved or regrouped")
    if rows_of(base_of(row, x.leaf))[: len(x.axes) - 1] != rows_of(x)[:-1]:
        raise Refused("a norm by the statistic of other rows")
    if not slot.is_dense():
        raise Refused("a result that does not lie row by row in memory")
    leaf, offset = without_offset(weight.leaf) if weight else (None, 0.0)
    if weight and (leaf is None or not _is_row(weight, value, channels)):
        raise Refused("a weight of another shape than a row")
    rows, steps = _ROWS[len(value.dims)]
    stream = Stream(
        channels=channels,
        norm=Norm("head", "before", leaf is not None, offset),
        rotation=None,
        passes=(Pass(0, 0, channels),),
        dtype=str(slot.dtype).removeprefix("torch."),
    )
    operand = Access(leaf, ()) if leaf is not None else None
    x_access = Access(x.leaf, steps)
    return Decoded(slot, value, stream, rows, x_access, weight=operand, eps=statistic.eps)


def _walks(index: Index, dim: tuple[object, ...], size: Size) -> bool:
    """Whether an axis is walked from end to end by a dim of its own."""
    if not dim:
        return bool(size == 1) and index.offsets == (0,) and not any(s for _, s in index.strides)
    used = tuple((a, s) for a, s in index.strides if s)
    return index.offsets == (0,) and len(dim) == 1 and used == ((dim[0], 1),)


def _is_row(weight: Factor, value: Value, channels: int) -> bool:
    """Whether a weight is a vector that meets the channels one by one."""
    shape = weight.leaf.shape
    return shape == (channels,) and _walks(weight.axes[0], value.dims[-1], channels)


def _terms(slot: Slot) -> tuple[Slot, Slot] | None:
    """Both terms of a plain sum of two tensors of one shape."""
    call = slot.call
    if call is None or call.op != aten.add.Tensor or call.kwargs or len(call.args) != 2:
        return None
    a, b = call.args
    if not isinstance(a, Slot) or not isinstance(b, Slot):
        return None
    alike = a.shape == b.shape == slot.shape and a.device == b.device == slot.device
    floating = a.dtype.is_floating_point and b.dtype.is_floating_point
    return (a, b) if alike and floating else None


def _norm_of(stream: Stream) -> Norm:
    assert stream.norm is not None
    return stream.norm


def _normed_row(
    x: torch.Tensor, stream: Stream, weight: torch.Tensor | None, *rest: object
) -> torch.Tensor:
    """The op's reference in a proof's terms."""
    record = AddNorm(stream.channels, _norm_of(stream), dtype=stream.dtype)
    eps = rest[-1]
    assert isinstance(eps, float)
    return reference.add_rms_norm(x, None, None, weight, eps, record)[1]
