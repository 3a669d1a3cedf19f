"""The lens: Dynamo's graph seen as the ATen calls it makes, in order. Only read, never compiled.

In comes a Dynamo graph with `example_value`s; out come `Call`s over `Slot`s, and for each Dynamo
node the slots of its result. Mutations stay visible where they happen; storages have identities,
so aliases can be told.

What a Dynamo call expands to depends only on its target, its constants and the metadata of its
inputs, so it is recorded once for each distinct key and replayed (`expansion`). Functions of
`WHOLE` are not expanded. A call that cannot be expanded, or whose expansion gives another shape or
dtype than Dynamo saw, becomes one opaque call that is taken to write to all its inputs.
"""

import contextlib
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fxfuse.expansion import Made, Recorder, Ref, Template, describe, difference, fresh
from fxfuse.slots import Call, Scalar, Size, Slot, View, slots_of
from fxfuse.torch_private import (
    fake_mode_of,
    is_mapped,
    size_of,
    storage_key,
    without_guards,
)

aten = torch.ops.aten


def _whole() -> dict[Any, Any]:
    """Functions kept as one call, and the op they are read as."""
    return {
        F.linear: aten.linear.default,
        F.rms_norm: aten.rms_norm.default,
        torch.rms_norm: aten.rms_norm.default,
        F.layer_norm: aten.layer_norm.default,
        torch.layer_norm: aten.layer_norm.default,
        F.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
        F.embedding: aten.embedding.default,
        F.softmax: aten.softmax.int,
        F.silu: aten.silu.default,
        F.gelu: aten.gelu.default,
        torch.matmul: aten.matmul.default,
        operator.matmul: aten.matmul.default,
        torch.bmm: aten.bmm.default,
        torch.einsum: aten.einsum.default,
        torch.conv1d: aten.conv1d.default,
        torch.conv2d: aten.conv2d.default,
        torch.conv3d: aten.conv3d.default,
    }


WHOLE = _whole()
# As exported programs have them; aten.embedding and aten.einsum have their arguments in an order of
# their own.
WHOLE |= {
    op: op for op in WHOLE.values() if op not in (aten.embedding.default, aten.einsum.default)
}


class _Lens:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.view = View(gm.graph, [], {})
        self.templates: dict[Any, Template | str] = {}
        self.keys: dict[int, int] = {}
        self.storages = 0
        self.autocast: list[tuple[Any, ...]] = []
        self.fake_mode = fake_mode_of(gm)
        self.mapped: set[fx.Node] = set()

    def look(self) -> View:
        for node in self.gm.graph.nodes:
            if node.op == "output":
                continue
            self.view.results[node] = self._node(node)
        return self.view

    def _node(self, node: fx.Node) -> Any:
        example = node.meta.get("example_value")
        tensors = _tensors(example)
        if any(map(is_mapped, tensors)):
            self.mapped.add(node)
        if node.op == "placeholder":
            return self._given(node, example)
        if node.op == "get_attr":
            attribute = operator.attrgetter(str(node.target))(self.gm)
            if isinstance(attribute, torch.Tensor):
                return self._given(node, example if example is not None else attribute)
            return attribute
        if node.target in _AUTOCAST:
            return self._region(node)
        if example is None and any(self._slots(node)):
            return self._call(node, None)
        if not tensors:
            self._read(node)
            return Scalar(node, example) if isinstance(example, torch.SymFloat) else example
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source = self.view.results[node.args[0]]
            if not isinstance(source, Slot):
                return source[node.args[1]]
        return self._call(node, example)

    def _read(self, node: fx.Node) -> None:
        """A call with a number as its result reads its tensors, unless it asks for sizes alone."""
        inputs = tuple(self._slots(node))
        if inputs and node.target not in _METADATA:
            self._add(Call("read", inputs, {}, node))

    def _slots(self, node: fx.Node) -> Iterator[Slot]:
        for arg in node.all_input_nodes:
            yield from slots_of(self.view.results[arg])

    def _given(self, node: fx.Node, example: Any) -> Any:
        def slot(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return self._slot(describe(x, None), self._storage(x), node)

        if isinstance(example, torch.SymFloat):
            return Scalar(node, example)
        return map_aggregate(example, slot)

    def _storage(self, t: torch.Tensor) -> int:
        key = storage_key(t)
        if key not in self.keys:
            self.keys[key] = self._new_storage()
        return self.keys[key]

    def _new_storage(self) -> int:
        self.storages += 1
        return self.storages

    def _slot(self, m: Made, storage: int, node: fx.Node) -> Slot:
        return Slot(m.shape, m.stride, m.offset, m.dtype, m.device, storage, node)

    def _region(self, node: fx.Node) -> None:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            self.autocast.append(node.args)
        else:
            self.autocast.pop()
        self.view.calls.append(Call("region", (), {}, node))

    def _call(self, node: fx.Node, example: Any) -> Any:
        """Expand one call by its template; on any trouble it is opaque."""
        if not self.mapped.isdisjoint((node, *node.all_input_nodes)):
            return self._opaque(node, example, "inside a vmap")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.view.results[n])
        if node.op == "call_function" and node.target in WHOLE:
            return self._whole(node, args, kwargs, example)
        if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
            return self._opaque(node, example, f"{node.target} is not read")
        flat, spec = _flattened(args, kwargs)
        inputs = list(dict.fromkeys(x for x in flat if isinstance(x, Slot)))
        try:
            key = (node.op, node.target, spec, tuple(self.autocast), *_key(flat, inputs))
            template = self.templates.get(key)
        except (TypeError, KeyError) as error:
            return self._opaque(node, example, f"an argument that cannot be compared: {error}")
        if template is None:
            template = self.templates[key] = self._record(node, flat, spec, inputs, example)
        if isinstance(template, str):
            return self._opaque(node, example, template)
        result = self._replay(node, template, inputs)
        self._note_storages(result, example)
        return result

    def _note_storages(self, result: Any, example: Any) -> None:
        """Which storage Dynamo's own tensor has, so that an opaque view of it can be told."""
        if isinstance(example, torch.Tensor) and isinstance(result, Slot):
            self.keys.setdefault(storage_key(example), result.storage)

    def _whole(self, node: fx.Node, args: Any, kwargs: Any, example: Any) -> Any:
        slot = self._slot(describe(example, None), self._storage(example), node)
        self._add(Call(WHOLE[node.target], args, kwargs, node, (slot,)))
        return slot

    def _opaque(self, node: fx.Node, example: Any, reason: str) -> Any:
        def slot(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return self._slot(describe(x, None), self._storage(x), node)

        self.view.opaque[node] = reason
        inputs = tuple(self._slots(node))
        result = map_aggregate(example, slot)
        outs = tuple(slots_of(result))
        self._add(Call(None, inputs, {}, node, outs, inputs))
        return result

    def _add(self, call: Call) -> None:
        for slot in call.outs:
            slot.call = call
        self.view.calls.append(call)

    def _record(
        self, node: fx.Node, flat: list[Any], spec: Any, inputs: list[Slot], example: Any
    ) -> Template | str:
        """Run one call on fresh fakes and write down what it calls; a text says why not."""
        try:
            with self.fake_mode, torch.no_grad(), without_guards(self.fake_mode):
                fakes = dict(zip(inputs, fresh(inputs), strict=True))
                live = [
                    fakes[x] if isinstance(x, Slot) else x.example if isinstance(x, Scalar) else x
                    for x in flat
                ]
                args, kwargs = _unflattened(live, spec)
                scalars = [x for x in flat if isinstance(x, Scalar)]
                with self._autocast(), Recorder(list(fakes.values()), scalars) as recorder:
                    if node.op == "call_method":
                        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                    else:
                        assert callable(node.target)
                        result = node.target(*args, **kwargs)
                if example is not None and (other := difference(result, example)):
                    return other
                return Template(tuple(recorder.steps), map_aggregate(result, recorder.ref))
        except Exception as error:
            return f"cannot be expanded: {type(error).__name__}: {error}".splitlines()[0]

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled, cache in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled, cache))
            yield

    def _replay(self, node: fx.Node, template: Template, inputs: list[Slot]) -> Any:
        made: list[Slot] = []
        new: dict[int, int] = {}

        def slot(x: Any) -> Any:
            return (made if x.inside else inputs)[x.number] if isinstance(x, Ref) else x

        for step in template.steps:
            outs = []
            for m in step.made:
                if isinstance(m.storage, Ref):
                    storage = slot(m.storage).storage
                    m = dataclasses.replace(m, offset=_offset(m, slot(m.storage), inputs))
                else:
                    storage = new.get(m.storage) or new.setdefault(m.storage, self._new_storage())
                outs.append(self._slot(m, storage, node))
            args, kwargs = map_aggregate(step.args, slot), map_aggregate(step.kwargs, slot)
            writes = tuple(slot(r) for r in step.writes)
            made += outs
            self._add(Call(step.op, args, kwargs, node, tuple(outs), writes))
        return map_aggregate(template.result, slot)


def _offset(made: Made, base: Slot, inputs: list[Slot]) -> Size:
    """Where a view begins in its storage: what was recorded on a fake begins at 0, unless inputs
    share that storage.
    """
    if sum(s.storage == base.storage for s in inputs) > 1:
        return made.offset
    return made.offset + base.offset * base.dtype.itemsize // made.dtype.itemsize


_METADATA = frozenset(
    {
        *("size", "stride", "storage_offset", "numel", "dim", "ndimension", getattr),
        *(aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default),
        aten.sym_storage_offset.default,
    }
)
_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The arguments in a row, and what puts them back: how many have no name and the others' names,
    or a TreeSpec where some are containers.
    """
    flat = [*args, *kwargs.values()]
    if any(isinstance(x, (tuple, list, dict)) for x in flat):
        return tree_flatten((args, kwargs))
    return flat, (len(args), tuple(kwargs))


def _unflattened(flat: list[Any], spec: Any) -> tuple[Any, Any]:
    if isinstance(spec, TreeSpec):
        return tuple(tree_unflatten(flat, spec))
    count, names = spec
    return tuple(flat[:count]), dict(zip(names, flat[count:], strict=True))


def _key(flat: list[Any], inputs: list[Slot]) -> tuple[Any, ...]:
    """All an expansion can depend on: sizes as expressions, aliases by their first holder."""
    first: dict[int, int] = {}
    for i, s in enumerate(inputs):
        first.setdefault(s.storage, i)
    numbers = {s: i for i, s in enumerate(inputs)}
    metadata = tuple(
        (s.shape, s.stride, s.offset, s.dtype, s.device, first[s.storage]) for s in inputs
    )
    return metadata, tuple(_constant_key(x, numbers) for x in flat)


def _constant_key(x: Any, numbers: dict[Slot, int]) -> Any:
    if isinstance(x, Slot):
        return ("slot", numbers[x])
    if isinstance(x, Scalar):
        return ("float", x.node.name)
    if isinstance(x, (torch.SymInt, torch.SymBool)):
        return ("size", size_of(x))
    if isinstance(x, slice):
        return ("slice", *(_constant_key(p, numbers) for p in (x.start, x.stop, x.step)))
    hash(x)
    return (type(x), x)


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def look(gm: fx.GraphModule) -> View:
    """Look at a Dynamo graph through the lens."""
    return _Lens(gm).look()
