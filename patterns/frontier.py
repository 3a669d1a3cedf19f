"""The frontier: for each rotated value, the last slot that a stream can make and something needs.

Calls are visited last to first. One whose results nobody outside a stream reads is absorbed by that
stream; of the others, each with a rotated Value is decoded and proved, or refused with the reason;
and so is each normed q or k of an attention that reads it unrotated.
"""

import dataclasses
import logging
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import fx

from fxfuse.patterns.access import Refused
from fxfuse.patterns.advice import BEFORE
from fxfuse.patterns.attention import Reader, statistic_in
from fxfuse.patterns.cut import cuts
from fxfuse.patterns.decode import decode, is_rotated
from fxfuse.patterns.norms import NORM_KINDS
from fxfuse.patterns.prove import Disproved, Untried, prove
from fxfuse.patterns.read import Reading
from fxfuse.patterns.roles import common_of
from fxfuse.patterns.site import Decoded
from fxfuse.patterns.value import Atom, Kind, Leaf, Value
from fxfuse.slots import Call, Scalar, Slot, slots_of

aten = torch.ops.aten
COPIES = (aten.clone.default, aten.contiguous.default)
log = logging.getLogger(__name__)


class Uses:
    """Who consumes a slot: calls by slot, and what the graph returns."""

    def __init__(self, reading: Reading) -> None:
        view = reading.view
        self.consumers: dict[Slot, list[Call]] = {}
        for call in view.calls:
            for slot in dict.fromkeys(call.inputs()):
                self.consumers.setdefault(slot, []).append(call)
        self.holder = view.holders()
        output = next(n for n in view.graph.nodes if n.op == "output")
        self.returned = {
            slot for node in output.all_input_nodes for slot in slots_of(view.results[node])
        }
        self.output = output


class Frontier:
    """The streams of a graph, the calls they absorb, and (stage, reason) of each refused slot.

    casts    what makes a cache's numbers of rows: a stream ends in front of them
    readers  who reads a normed and unrotated q or k, by its statistic
    stored   the statistics of normed rows that go into a cache
    stored_norms
             those that a site's v may be, with the norm as their record
    normed   other normed values that are needed, last to first
    """

    def __init__(
        self,
        reading: Reading,
        readers: Mapping[Leaf, Reader],
        stored: Container[Leaf] = (),
        casts: Container[Call] = (),
        *,
        training: bool,
    ) -> None:
        self.reading = reading
        self.casts = casts
        self.readers, self.stored = readers, stored
        self.stored_norms: dict[Slot, Decoded] = {}
        self.reader_of: dict[Slot, Reader] = {}
        self.normed: list[tuple[Leaf, Slot, Value]] = []
        self.training = training
        self.uses = Uses(reading)
        self.grad_modes = _grad_modes(reading.view.graph)
        self.absorbed: set[Call] = set()
        self.operands: set[Any] = set()
        self.streams: list[Decoded] = []
        self.refused: dict[Slot, tuple[str, str]] = {}
        self.disproved: list[str] = []
        for call in reversed(reading.view.calls):
            self._visit(call)

    def _visit(self, call: Call) -> None:
        """Calls come last to first: one whose results nobody outside a stream needs is part of that
        stream.
        """
        if not call.outs or call.writes or call not in self.reading.relations:
            return
        if call in self.casts:
            return
        if not any(self._is_needed(slot) for slot in call.outs):
            self.absorbed.add(call)
            return
        slot = call.outs[0]
        value = self.reading.values[slot]
        if not self._computes(call) and not self._parts_rows(call):
            return
        if is_rotated(rows := _with_channels(value)):
            self._try(call, slot, rows, "decode")
        elif (leaf := statistic_in(value)) in self.readers:
            self._try(call, slot, value, "norm")
        elif leaf is not None and not (
            leaf in self.stored and self._accept_stored(call, slot, value)
        ):
            self.normed.append((leaf, slot, value))

    def _try(self, call: Call, slot: Slot, value: Value, stage: str) -> None:
        """Accept a value, or say why not; `stage` is what a refusal names."""
        try:
            self._accept(call, slot, value)
        except Disproved as error:
            self.refused[slot] = ("prove", str(error))
            self.disproved.append(f"{slot.node.name}: {error}")
        except Exception as error:
            reason = str(error)
            if isinstance(error, Untried) and stage != "norm":
                stage = "prove"
            if not isinstance(error, (Refused, Untried)):
                name = slot.node.name
                log.warning("fxfuse: an error of fxfuse, %s is left alone", name, exc_info=True)
                reason = f"an error of fxfuse: {type(error).__name__}: {error}"
            if stage != "norm" and self._accept_part(call, slot):
                stage, reason = "cut", f"{BEFORE}{reason}"
            self.refused[slot] = (stage, reason)

    def _accept_part(self, call: Call, slot: Slot) -> bool:
        """Whether the slot is a stream from a tensor in the midst of its chain on."""
        for value in map(_with_channels, cuts(self.reading, slot)):
            if is_rotated(value):
                try:
                    self._accept(call, slot, value)
                except Exception as error:
                    log.debug("not fused from there on: %s", error)
                    continue
                return True
        return False

    def _computes(self, call: Call) -> bool:
        """Whether a call's result is a stream's end: no view, but for the one that merges pairs
        into channels, as the flatten after a stack or after view_as_real. What others read as well
        is itself the end, and not a copy of it.
        """
        is_view = self.reading.relations[call] == "view"
        if (is_view or call.op in COPIES) and not self._alone_reads(call):
            return False
        if not is_view:
            return True
        x, y = self.reading.values[call.inputs()[0]].dims, self.reading.values[call.outs[0]].dims
        if len(x) < 2 or not y or x[-1] == y[-1] or x[:-2] != y[:-1]:
            return False
        return y[-1] == (*x[-2], *x[-1])

    def _alone_reads(self, call: Call) -> bool:
        """Whether what a view or a copy sees, through views too, has no other reader."""
        readers = (call, *self.reading.views_of(call.inputs()[0]))
        seen = [(reader, reader.inputs()[0]) for reader in readers]
        return all(
            slot not in self.uses.returned and self.uses.consumers[slot] == [reader]
            for reader, slot in seen
        )

    def _parts_rows(self, call: Call) -> bool:
        """Whether a view gives tokens and heads axes of their own, of a norm over rows of heads
        that one axis held: as the stream's end it leaves q and k where they lie.
        """
        values, value = self.reading.values, self.reading.values[call.outs[0]]
        slot = before = call.inputs()[0]
        while slot.call is not None and self.reading.relations.get(slot.call) == "view":
            slot = slot.call.inputs()[0]
        every = (values[slot].dims[:-1], values[before].dims, value.dims)
        joined = [any(len(dim) > 1 for dim in dims) for dims in every]
        return joined == [True, True, False] and statistic_in(value) in self.readers

    def _is_needed(self, slot: Slot) -> bool:
        consumers = self.uses.consumers.get(slot, [])
        if slot in self.operands:
            return True
        return slot in self.uses.returned or any(c not in self.absorbed for c in consumers)

    def _accept(self, call: Call, slot: Slot, value: Value) -> None:
        decoded = self._decoded(slot, value)
        if decoded.stream.rotation is None:
            self._check_norm(decoded, value)
        decoded = self._proven(decoded)
        stream = dataclasses.replace(decoded.stream, heads_first=_is_heads_first(decoded))
        self.streams.append(dataclasses.replace(decoded, stream=stream))
        self._take(call, decoded)

    def _decoded(self, slot: Slot, value: Value) -> Decoded:
        if slot not in self.uses.holder:
            raise Refused("a result inside one call of the model's graph")
        decoded = decode(slot, value)
        dtype = str(slot.dtype).removeprefix("torch.")
        return dataclasses.replace(decoded, stream=dataclasses.replace(decoded.stream, dtype=dtype))

    def _proven(self, decoded: Decoded) -> Decoded:
        """Raises Refused, Untried, Disproved."""
        for access in decoded.accesses():
            self._check_operand(access.leaf.slot, decoded.slot)
        if self.training:
            self.check_gradients(decoded)
        prove(decoded)
        return decoded

    def _take(self, call: Call, decoded: Decoded) -> None:
        self.absorbed.add(call)
        self.operands.update(a.leaf.slot for a in decoded.accesses())

    def _accept_stored(self, call: Call, slot: Slot, value: Value) -> bool:
        """Whether normed rows are what a store can norm: by head and by no tensor but the rows."""
        try:
            decoded = self._decoded(slot, value)
            norm = decoded.stream.norm
            if norm is None or norm.over != "head" or len(decoded.accesses()) > 1:
                return False
            self.stored_norms[slot] = self._proven(decoded)
        except Disproved as error:
            self.disproved.append(f"{slot.node.name}: {error}")
            return False
        except Exception as error:
            log.debug("%s stays in front of its store: %s", slot.node.name, error)
            return False
        self._take(call, decoded)
        return True

    def release(self, decoded: Decoded) -> None:
        """Normed rows that no site stores: what computes them stays, and reads for itself."""
        kept = {d.slot for d in self.streams}
        ends = {a.leaf.slot for a in decoded.accesses()} | kept
        waiting = [decoded.slot]
        while waiting:
            call = waiting.pop().call
            if call in self.absorbed:
                self.absorbed.discard(call)
                waiting += [slot for slot in call.inputs() if slot not in ends]

    def _check_norm(self, decoded: Decoded, value: Value) -> None:
        """Raises Refused where a stream without a rotation is not the norm of one head."""
        norm, leaf = decoded.stream.norm, statistic_in(value)
        if norm is None or norm.over != "head" or leaf is None or leaf not in self.readers:
            raise Refused("a norm over other channels than a head's")
        self.reader_of[decoded.slot] = self.readers[leaf]

    def _check_operand(self, operand: Any, slot: Slot) -> None:
        if isinstance(operand, Scalar):
            return
        if not isinstance(operand, Slot):
            raise Refused("an operand that no node of the graph holds")
        if operand not in self.uses.holder:
            raise Refused("an operand inside one call of the model's graph")
        if operand.device != slot.device:
            raise Refused(f"operands on {operand.device} and {slot.device}")

    def check_gradients(self, decoded: Decoded) -> None:
        """Raises Refused where the op's gradient would not be the graph's."""
        norm = decoded.stream.norm
        if norm is not None and NORM_KINDS[norm.kind].slope is None:
            raise Refused(f"no gradient for the norm kind {norm.kind}")
        for table in (decoded.cos, decoded.sin):
            slot = table.leaf.slot if table else None
            if isinstance(slot, Slot):
                example = self.uses.holder[slot].meta.get("example_value")
                if isinstance(example, torch.Tensor) and example.requires_grad:
                    raise Refused("a table that requires a gradient")
        chain = self.chain(decoded)
        if any(call.op == aten.detach.default for call in chain):
            raise Refused("a detached value: the op would give it a gradient")
        if len({self.grad_modes[call.node] for call in chain}) > 1:
            raise Refused("a chain that is computed in part without gradients")

    def chain(self, decoded: Decoded) -> list[Call]:
        """The calls that make a stream's result from its operands."""
        ends = {a.leaf.slot for a in decoded.accesses()}
        found: dict[Call, None] = {}
        waiting = [decoded.slot]
        while waiting:
            slot = waiting.pop()
            if slot in ends or slot.call is None or slot.call in found:
                continue
            found[slot.call] = None
            waiting += slot.call.inputs()
        return list(found)


def _grad_modes(graph: fx.Graph) -> dict[fx.Node, bool]:
    """For each node, whether the graph has grad mode on there."""
    modes, mode = {}, True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            mode = bool(node.args[0])
        modes[node] = mode
    return modes


def _with_channels(value: Value) -> Value:
    """The value with one axis of channels where its last two are those of pairs."""
    lead, last = value.dims[:-2], value.dims[-2:]
    if not lead or not any(_holds_a_pair(value, dim) for dim in last):
        return value
    return dataclasses.replace(value, dims=(*lead, last[0] + last[1]))


def _holds_a_pair(value: Value, dim: tuple[Atom, ...]) -> bool:
    """Whether the two of a pair stand along an axis: each is computed for itself, or of the same
    numbers of the source by two of a table.
    """
    if len(dim) != 1 or dim[0].size != 2:
        return False
    factors = [f for term in value.terms for f in term.factors]
    walked = {f.leaf for f in factors if any(index.stride(dim[0]) for index in f.axes)}
    sources = {leaf for leaf in common_of(value) if leaf.kind is Kind.DATA}
    return dim[0] in value.explicit or (bool(walked) and not walked & sources)


def _is_heads_first(decoded: Decoded) -> bool:
    """The memory order the graph's own result has, or its dims' order where the sizes leave it
    open.
    """
    _, token, head = decoded.rows
    if token is None or head is None:
        return False
    stride, shape = decoded.slot.stride, decoded.slot.shape
    if shape[token] == 1 or shape[head] == 1:
        return head < token
    a, b = stride[head], stride[token]
    return a > b if isinstance(a, int) and isinstance(b, int) else head < token
