"""Attention over keys and values that were repeated for every query head.

In: a reading. Out: each scaled_dot_product_attention whose k and v [B, G * n, S, D] hold each of
G heads n times, in the order that `enable_gqa=True` counts them, with the [B, G, S, D] they were
repeated from. That they are the same numbers is read off the Values: alike but for one atom, of
size n, that walks no tensor.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.attention

from fxfuse.patterns import decode_attention
from fxfuse.patterns.access import Refused
from fxfuse.patterns.attention import NAMES
from fxfuse.patterns.chosen import numbers_of
from fxfuse.patterns.decode_attention import decoding, has_one_query
from fxfuse.patterns.frontier import Frontier
from fxfuse.patterns.read import Reading
from fxfuse.patterns.record import GroupedHeads
from fxfuse.patterns.site import Gate, GroupedSite, Left, Refusal, Repeated, Step, location
from fxfuse.patterns.transfer import NOT_FORESEEN
from fxfuse.patterns.value import Atom, Opaque, Value
from fxfuse.slots import Call, Slot

aten = torch.ops.aten
log = logging.getLogger(__name__)

KIND = "grouped_heads"
SIGNATURE = (*NAMES, "attn_mask", "dropout_p", "is_causal")
# What a call may do between the heads and their repetition: no arithmetic.
MOVES = ("view", "same")
JOINS = (aten.stack.default, aten.cat.default)
CALLS = (
    torch.nn.functional.scaled_dot_product_attention,
    aten.scaled_dot_product_attention.default,
)


class Groups:
    """The attention calls of a graph that read repeated heads: sites, refusals, and those left to
    the compiler.
    """

    def __init__(self, reading: Reading, frontier: Frontier, gate: Gate) -> None:
        self.reading, self.frontier = reading, frontier
        self.sites: list[GroupedSite] = []
        self.left: list[Left] = []
        self.refusals: list[Refusal] = []
        for call in _attention_calls(reading):
            node = call.node
            try:
                site = self._decoding(self._site(call), gate)
                decodes = site.kind == decode_attention.KIND
                reason = "" if decodes else gate(KIND, site.query, site.rows, site.record)
            except Refused as error:
                self.refusals.append(Refusal(KIND, node.name, str(error), location(node)))
                continue
            except Exception as error:
                log.warning("fxfuse: an error of fxfuse, %s is left alone", node, exc_info=True)
                told = f"an error of fxfuse: {type(error).__name__}: {error}"
                self.refusals.append(Refusal(KIND, node.name, told, location(node)))
                continue
            if reason:
                self.left.append(Left(KIND, reason, node.name, location(node)))
            else:
                self.sites.append(site)

    def _site(self, call: Call) -> GroupedSite:
        """Raises Refused."""
        self._check_kernels()
        q, k, v = (_operand(call, i) for i in range(3))
        if call.node.target not in CALLS:
            raise Refused(f"heads are repeated for {call.node.target}, which is not known")
        key, value = (self._repeated(slot, call) for slot in (k, v))
        if key.times != value.times or q.shape[1] != k.shape[1] or k.shape[1] != v.shape[1]:
            raise Refused("k and v are repeated differently, or not for every head of q")
        given = _arguments(call)
        if given.get("dropout_p"):
            raise Refused("attention with dropout draws other numbers over grouped heads")
        record = GroupedHeads(
            heads=q.shape[1],
            kv_heads=q.shape[1] // key.times,
            channels=q.shape[-1],
            has_mask=given.get("attn_mask") is not None,
            dtype=str(q.dtype).removeprefix("torch."),
        )
        return GroupedSite(record, call, q, key, value)

    def _decoding(self, site: GroupedSite, gate: Gate) -> GroupedSite:
        """The site as one of attention with one query row, where it is one and the gate has it."""
        node, q = site.call.node, site.query
        if not has_one_query(q):
            return site
        sources = (site.key.slot, site.value.slot)
        given = _arguments(site.call)
        try:
            record = decoding(self.frontier, site.call, given, sources, site.key.times)
        except Refused as error:
            kind, where = decode_attention.KIND, location(node)
            self.refusals.append(Refusal(kind, node.name, str(error), where))
            return site
        kind = decode_attention.KIND
        if reason := gate(kind, q, site.rows, record):
            # Nobody would look for the stage on a CPU.
            if q.device.type != "cpu":
                self.left.append(Left(kind, reason, node.name, location(node)))
            return site
        mask, scale = given.get("attn_mask"), given.get("scale")
        return dataclasses.replace(site, record=record, kind=kind, mask=mask, scale=scale)

    def _check_kernels(self) -> None:
        """Raises Refused where attention may be left without a kernel: of those on a GPU not all
        read grouped heads.
        """
        if not torch.backends.cuda.math_sdp_enabled():  # type: ignore[no-untyped-call]
            raise Refused("torch's math attention, which reads grouped heads anywhere, is off")
        for node in self.reading.view.graph.nodes:
            if getattr(node.target, "__module__", "") == torch.nn.attention.__name__:
                raise Refused("the model chooses the kernels of its attention (sdpa_kernel)")

    def _repeated(self, slot: Slot, call: Call) -> Repeated:
        """The tensor that a k or v was repeated from. Raises Refused."""
        value = self.reading.values[slot]
        if (found := gathered(self.reading, slot)) is not None:
            source, times = found
            assert slot.call is not None
            self._check(source, call, [slot.call])
            return Repeated(source, (), times)
        atom = repeating_atom(value)
        if atom is None:
            raise Refused("k or v is repeated, and the other is not")
        chain: list[Call] = []
        holder = self.frontier.uses.holder
        while slot.call is not None:
            if atom not in self.reading.values[slot].atoms and slot in holder:
                break
            inputs = set(slot.call.inputs())
            moves = self.reading.relations.get(slot.call) in MOVES or slot.call.op in JOINS
            if not moves or len(inputs) != 1:
                break
            chain.append(slot.call)
            slot = inputs.pop()
        if atom in self.reading.values[slot].atoms or slot not in holder:
            raise Refused("heads that are repeated by more than moving them about")
        self._check(slot, call, chain)
        before = _as_read(self.reading.values[slot], slot, value)
        return Repeated(slot, steps_between(before, value, atom), atom.size)

    def _check(self, source: Slot, call: Call, chain: list[Call]) -> None:
        """Raises Refused where attention itself cannot read what the heads were repeated from."""
        reading, frontier = self.reading, self.frontier
        if source not in frontier.uses.holder:
            raise Refused("heads inside one call of the model's graph")
        if any(c.outs[0].dtype != source.dtype for c in chain):
            raise Refused("repeated heads that are cast before attention reads them")
        if any(c.outs[0].device != source.device for c in chain):
            raise Refused("repeated heads that are moved before attention reads them")
        copies = [c.outs[0] for c in chain if c.outs[0].storage != source.storage]
        if any(reading.is_written(copy, call) for copy in copies):
            raise Refused("repeated heads that are written before attention reads them")
        version = reading.versions_at(chain[-1], source.storage)
        if reading.versions_at(call, source.storage) != version:
            raise Refused("heads that are written after they were repeated")
        modes = {frontier.grad_modes[c.node] for c in (*chain, call)}
        detached = any(c.op == aten.detach.default for c in chain)
        if frontier.training and (len(modes) > 1 or detached):
            raise Refused("heads that are repeated without gradients")


def _attention_calls(reading: Reading) -> Iterator[Call]:
    """The attention calls whose k or v has repeated heads."""
    for call in reading.view.calls:
        if call.op is aten.scaled_dot_product_attention.default:
            operands = [_operand(call, i) for i in range(3)]
            four = all(isinstance(x, Slot) and len(x.shape) == 4 for x in operands)
            if four and any(_is_repeated(reading, x) for x in operands[1:]):
                yield call


def _is_repeated(reading: Reading, slot: Slot) -> bool:
    repeats = repeating_atom(reading.values[slot]) is not None
    return repeats or gathered(reading, slot) is not None


def _arguments(call: Call) -> dict[str, Any]:
    """Those that are given, by name."""
    return dict(zip(SIGNATURE, call.args, strict=False)) | call.kwargs


def _operand(call: Call, index: int) -> Slot:
    found: Slot = call.args[index] if index < len(call.args) else call.kwargs[NAMES[index]]
    return found


def repeating_atom(value: Value) -> Atom | None:
    """The last part of the head axis, if no tensor is walked by it: that of its repetitions."""
    if len(value.dims) != 4 or not value.dims[1]:
        return None
    atom = value.dims[1][-1]
    axes = [index for term in value.terms for factor in term.factors for index in factor.axes]
    walked = atom in value.explicit or any(index.stride(atom) for index in axes)
    return None if walked or not axes or not isinstance(atom.size, int) else atom


def gathered(reading: Reading, slot: Slot) -> tuple[Slot, int] | None:
    """Of x[:, numbers] with [0, 0, .., 1, 1, ..] in the model's code: x, and how often each."""
    call = slot.call
    if call is None or len(slot.shape) != 4:
        return None
    if call.op is aten.index_select.default:
        x, dim, index = call.args
    elif call.op is aten.index.Tensor and len(call.args[1]) == 2 and call.args[1][0] is None:
        x, dim, index = call.args[0], 1, call.args[1][1]
    else:
        return None
    heads, whole = x.shape[1], slot.shape[1]
    if dim % 4 != 1 or not all(isinstance(n, int) for n in (heads, whole)) or whole % heads:
        return None
    try:
        numbers = numbers_of(index, reading.writes)
    except (Opaque, *NOT_FORESEEN):
        return None
    times = whole // heads
    wanted = [i // times for i in range(whole)]
    return (x, times) if times > 1 and numbers.tolist() == wanted else None


def _as_read(own: Value, slot: Slot, repeated: Value) -> Value:
    """The Value of a slot as its repetition read it: where it was written since it was made, that
    is a leaf of its own, seen as a whole.
    """
    if own.terms == repeated.terms or len(repeated.terms) != 1:
        return own
    factors = repeated.terms[0].factors
    if len(factors) != 1 or factors[0].leaf.slot is not slot or repeated.explicit:
        return own
    dims = []
    for index, size in zip(factors[0].axes, slot.shape, strict=True):
        walked = [(a, s) for a, s in index.strides if s]
        whole = index.offsets == (0,) and [(a.size, s) for a, s in walked] == [(size, 1)]
        if not whole and (walked or size != 1):
            return own
        dims.append(tuple(a for a, _ in walked))
    return Value(tuple(dims), (), repeated.terms, repeated.dtype)


def steps_between(source: Value, repeated: Value, atom: Atom) -> tuple[Step, ...]:
    """The views that give a source the axes of what was repeated from it, without the repetition.
    Raises Refused where their numbers are not the same, in as many axes.
    """
    wanted = [tuple(a for a in dim if a is not atom) for dim in repeated.dims]
    left = list(enumerate(source.dims))
    order: list[int] = []
    for dim in wanted:
        place = next((i for i, other in left if other == dim), None)
        if place is None:
            raise Refused("repeated heads that are regrouped with other axes")
        order.append(place)
        left = [(i, other) for i, other in left if i != place]
    if any(dim for _, dim in left) or source.terms != repeated.terms:
        raise Refused("repeated heads that are not those they were made of")
    steps: list[Step] = []
    for surplus, _ in reversed(left):
        steps.append(("select", surplus, 0))
        order = [i - (i > surplus) for i in order]
    if order != sorted(order):
        steps.append(("permute", tuple(order)))
    return tuple(steps)
