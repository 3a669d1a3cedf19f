"""The projection in front of a site: q, k and v as products of one x with weights, few rows of it.

In: a site whose k is stored. Out: the same site from x and the weights on, where its q, k and v are
nothing but parts of `linear(x, weight, bias)` and nobody else reads those; or Refused.
"""

import dataclasses
import logging
from typing import Any

import torch
from torch.fx.node import map_aggregate

from fxfuse.patterns.access import Refused
from fxfuse.patterns.add_norm import Norms
from fxfuse.patterns.frontier import Uses
from fxfuse.patterns.input_norm import InputNorms
from fxfuse.patterns.memory import Memory
from fxfuse.patterns.read import Reading
from fxfuse.patterns.site import (
    Access,
    Decoded,
    Gate,
    Left,
    Projection,
    Refusal,
    Site,
    Step,
    location,
)
from fxfuse.patterns.value import Kind, Leaf, product
from fxfuse.slots import Call, Slot
from fxfuse.torch_private import is_wrapped, storage_key

aten = torch.ops.aten
log = logging.getLogger(__name__)

KIND = "projection"
# More rows than these no kernel takes.
MAX_ROWS = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One stream of a product: its linear, and where on the product's last axis its heads lie."""

    linear: Call
    heads: int
    channels: int
    first: int
    stride: int


class Projections:
    """Sites with their projections taken in; what was left to the compiler, or refused."""

    def __init__(
        self,
        reading: Reading,
        uses: Uses,
        absorbed: set[Call],
        memory: Memory,
        norms: Norms,
        gate: Gate,
    ) -> None:
        self.input_norms = InputNorms(reading, uses, memory, norms, gate)
        self.reading, self.uses, self.absorbed = reading, uses, absorbed
        self.memory, self.gate = memory, gate
        # One list: of a site, its projection is left, or the norm in front of that.
        self.left: list[Left] = self.input_norms.left
        self.refusals: list[Refusal] = []

    def grown(self, site: Site) -> Site:
        """The site with its projection, or as it is."""
        rows, slot = site.rows, site.q.slot
        if site.k_store is None or site.is_single() or rows is None or rows > MAX_ROWS:
            return site
        if any(self._made(stream).call is None for stream in site.streams()):
            # Products of another graph.
            return site
        if reason := self.gate(KIND, slot, rows, site.record):
            # A CPU multiplies as it does; nobody would look for the stage there.
            if slot.device.type != "cpu":
                self.left.append(Left(KIND, reason, slot.node.name, location(slot.node)))
            return site
        try:
            projection = self._projection(site)
        except Exception as error:
            told = str(error)
            if not isinstance(error, Refused):
                log.warning("fxfuse: an error of fxfuse, %s is not projected", slot.node.name)
                log.debug("fxfuse failed", exc_info=True)
                told = f"an error of fxfuse: {type(error).__name__}: {error}"
            self.refusals.append(Refusal(KIND, slot.node.name, told, location(slot.node)))
            return site
        record = dataclasses.replace(site.record, projected=True)
        grown = dataclasses.replace(site, record=record, projection=projection)
        try:
            return self.input_norms.grown(grown, {self._made(s).call for s in site.streams()})
        except Exception:
            log.warning("fxfuse: an error of fxfuse, the norm in front of %s stays", slot.node.name)
            log.debug("fxfuse failed", exc_info=True)
            return grown

    def _projection(self, site: Site) -> Projection:
        """Raises Refused."""
        parts = [self._part(stream) for stream in site.streams()]
        linears = list(dict.fromkeys(part.linear for part in parts))
        x = linears[0].args[0]
        if any(call.args[0] is not x for call in linears):
            raise Refused("q, k and v are projections of different tensors")
        if x.dtype not in DTYPES or any(_weight(c).dtype != x.dtype for c in linears):
            raise Refused("a projection whose weight and input are of other dtypes")
        for call in linears:
            self._check_weight(_weight(call))
            self._check_readers(call.outs[0], site)
        batch, tokens = (
            1 if row is None else int(site.q.slot.shape[row]) for row in site.q.rows[:2]
        )
        shape = (batch, tokens, int(x.shape[-1]))
        steps: tuple[Step, ...] = () if tuple(x.shape) == shape else (("reshape", shape),)
        found = Projection(
            x=Access(self._leaf(x, linears[0], Kind.DATA), steps),
            weights=tuple(self._weight_access(part) for part in parts),
            biases=tuple(self._bias_access(part) for part in parts),
        )
        self.memory.check([], found.accesses(), [], site.before, self.uses.holder)
        return found

    def _part(self, stream: Decoded) -> _Part:
        """Raises Refused where a stream is no part of one plain product."""
        views, made = self.reading.views_of(stream.x.leaf.slot), self._made(stream)
        call = made.call
        assert call is not None
        if call.op is not aten.linear.default:
            raise Refused(f"a projection that is no plain linear: {_name(call)}")
        if self.reading.writes.get(made.storage):
            raise Refused("a projection that is written before it is used")
        if not all(isinstance(n, int) for n in (*made.shape, *_weight(call).shape)):
            raise Refused("a projection of symbolic sizes")
        return _placed(stream, call, made, views)

    def _made(self, stream: Decoded) -> Slot:
        """What a stream's source is a view of, or the source itself."""
        return self.reading.viewed(stream.x.leaf.slot)

    def _check_weight(self, weight: Slot) -> None:
        """Raises Refused for a weight that is no part of a plain parameter."""
        parameter = self.reading.viewed(weight)
        example = parameter.node.meta.get("example_value")
        if is_wrapped(example):
            raise Refused(f"a projection whose weight is wrapped: {type(example).__name__}")
        if parameter.call is not None:
            raise Refused(f"a projection whose weight the graph makes: {_name(parameter.call)}")
        if weight.stride[-1] != 1:
            raise Refused("a projection whose weight is transposed")

    def _check_readers(self, product: Slot, site: Site) -> None:
        """Raises Refused where somebody else reads a product too, which would be made twice."""
        own = {store.call for store in site.stores()}
        through = {call for store in site.stores() for call in store.through}
        for access in (a for stream in site.streams() for a in stream.accesses()[1:]):
            if isinstance(access.leaf.slot, Slot) and access.leaf.slot.storage == product.storage:
                raise Refused("a projection that others read too: the statistic of its rows")
        waiting = [product]
        if site.v is not None and site.v.stream.norm is not None:
            # Its norm is part of the site, what the norm gives need not be.
            waiting.append(site.v.slot)
        while waiting:
            slot = waiting.pop()
            if slot in self.uses.returned:
                raise Refused("a projection that others read too")
            for call in self.uses.consumers.get(slot, []):
                if call in self.absorbed or call in own:
                    continue
                if self.reading.relations.get(call) != "view" and call not in through:
                    raise Refused(f"a projection that others read too: {_name(call)}")
                waiting += call.outs

    def _weight_access(self, part: _Part) -> Access:
        """The rows of a weight as [H, D, hidden]."""
        weight = _weight(part.linear)
        return Access(self._leaf(weight, part.linear, Kind.WEIGHT), _steps(part, weight))

    def _bias_access(self, part: _Part) -> Access | None:
        """A bias as [H, D]."""
        args, kwargs = part.linear.args, part.linear.kwargs
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        if bias is None:
            return None
        if bias.dtype not in DTYPES:
            raise Refused("a projection whose bias is of another dtype")
        return Access(self._leaf(bias, part.linear, Kind.WEIGHT), _steps(part, bias))

    def _leaf(self, slot: Slot, call: Call, kind: Kind) -> Leaf:
        if slot not in self.uses.holder:
            raise Refused("a projection whose operands no node of the graph holds")
        version = self.reading.versions_at(call, slot.storage)
        return Leaf(-1, slot.shape, slot.dtype, kind, slot, version)


def _name(call: Call) -> str:
    return "a call that is not read" if call.op is None else str(call.op)


def _weight(call: Call) -> Slot:
    found: Slot = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
    return found


def _placed(stream: Decoded, call: Call, made: Slot, views: list[Call]) -> _Part:
    """Where a stream [B, T, H, D] lies in a product [.., N]. Raises Refused unless its rows are the
    product's, in order, and the channels of a head neighbours.
    """
    base = torch.empty_strided(made.shape, made.stride, device="meta")
    tensors = {made: base}
    for each in views:
        outs = _done(each, tensors)
        tensors |= zip(each.outs, (outs,) if isinstance(outs, torch.Tensor) else outs, strict=True)
    view = stream.x.apply(tensors[stream.x.leaf.slot])
    if storage_key(view) != storage_key(base):
        raise Refused("a projection that is copied before it is used")
    width = int(made.shape[-1])
    batch, tokens, heads, channels = (int(n) for n in view.shape)
    strides = view.stride()
    expected = (tokens * width, width, strides[2], 1)
    sizes = zip(view.shape, strides, expected, strict=True)
    if any(size != 1 and stride != wanted for size, stride, wanted in sizes):
        raise Refused("a projection that is regrouped before it is used")
    first = int(view.storage_offset())
    stride = int(strides[2]) if heads > 1 else channels
    inside = stride >= channels and first + (heads - 1) * stride + channels <= width
    if not made.is_dense() or product(made.shape[:-1]) != batch * tokens or not inside:
        raise Refused("a projection that is regrouped before it is used")
    return _Part(call, heads, channels, first, stride)


def _done(call: Call, tensors: dict[Slot, torch.Tensor]) -> Any:
    """What a call gives for these tensors."""
    given = (call.args, call.kwargs)
    args, kwargs = map_aggregate(given, lambda x: tensors[x] if isinstance(x, Slot) else x)
    return call.op(*args, **kwargs)


def _steps(part: _Part, weight: Slot) -> tuple[Step, ...]:
    """A weight's (or bias') first axis as heads and channels."""
    size = int(weight.shape[0])
    inner = part.first % part.stride if part.stride != part.channels else 0
    base, span = part.first - inner, part.heads * part.stride
    if base + span > size or inner + part.channels > part.stride:
        raise Refused("heads that end outside the projection")
    steps: list[Step] = [] if span == size else [("narrow", 0, base, span)]
    steps.append(("unflatten", 0, (part.heads, part.stride)))
    if part.channels != part.stride:
        steps.append(("narrow", 1, inner, part.channels))
    return tuple(steps)
