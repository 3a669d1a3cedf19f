"""The lens: Dynamo's graph seen as the ATen calls it makes, in order. Only read, never compiled.

In comes a Dynamo graph with `example_value`s; out come `Call`s over `Slot`s, and for each Dynamo node the slots of its
result. Mutations stay visible where they happen; storages have identities, so aliases can be told.

What a Dynamo call expands to depends only on its target, its constants and the metadata of its inputs, so the
expansion is recorded once for each distinct key, on fresh fake tensors, and replayed as a template. Functions of
`WHOLE` are not expanded. A call that cannot be expanded, or whose expansion gives another shape or dtype than Dynamo
saw, becomes one opaque call that is taken to write to all its inputs.
"""

import contextlib
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxfuse.torch_private import fake_mode_of, size_of, storage_key, symint_of, without_guards

aten = torch.ops.aten

Size: TypeAlias = Any
Key: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A float of the graph: a node whose value is a SymFloat."""

    node: fx.Node
    example: torch.SymFloat


@dataclasses.dataclass(eq=False)
class Slot:
    """One tensor as one call returned it (or as the graph received it)."""

    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size
    dtype: torch.dtype
    device: torch.device
    storage: int
    node: fx.Node
    call: "Call | None" = None


@dataclasses.dataclass(eq=False)
class Call:
    """One ATen call; op None: a call that was not understood, and may have written to any input."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: fx.Node
    outs: tuple[Slot, ...] = ()
    writes: tuple[Slot, ...] = ()

    def inputs(self) -> list[Slot]:
        return slots_of((self.args, self.kwargs))


def slots_of(tree: Any) -> list[Slot]:
    """The slots in nested tuples, lists, dicts and slices, in order."""
    found: list[Slot] = []
    map_aggregate(tree, lambda x: found.append(x) if isinstance(x, Slot) else None)
    return found


def _has_tensor(tree: Any) -> bool:
    return isinstance(tree, torch.Tensor) or (
        isinstance(tree, (tuple, list, dict)) and any(isinstance(x, torch.Tensor) for x in tree_flatten(tree)[0])
    )


@dataclasses.dataclass
class View:
    """The whole graph through the lens."""

    graph: fx.Graph
    calls: list[Call]
    results: dict[fx.Node, Any]
    expansions: int = 0
    opaque: dict[fx.Node, str] = dataclasses.field(default_factory=dict)


def _whole() -> dict[Any, Any]:
    """Functions kept as one call, and the op they are read as."""
    return {
        F.linear: aten.linear.default,
        F.rms_norm: aten.rms_norm.default,
        F.layer_norm: aten.layer_norm.default,
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


# --- templates ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Ref:
    """An input of a recorded expansion, or a tensor made inside it."""

    inside: bool
    number: int


@dataclasses.dataclass(frozen=True)
class _Made:
    """A tensor made inside an expansion; storage: the _Ref whose storage it shares, or a number of a new one."""

    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size
    dtype: torch.dtype
    device: torch.device
    storage: Any


@dataclasses.dataclass(frozen=True)
class _Step:
    op: Any
    args: Any
    kwargs: Any
    first: int
    made: tuple[_Made, ...]
    writes: tuple[_Ref, ...]


@dataclasses.dataclass(frozen=True)
class _Template:
    steps: tuple[_Step, ...]
    result: Any


class _Recorder(TorchDispatchMode):
    """Records each ATen call made under it."""

    def __init__(self, inputs: list[torch.Tensor], scalars: list[Scalar]) -> None:
        super().__init__()
        self.scalars = {id(x.example): x for x in scalars}
        self.refs = {id(t): _Ref(False, i) for i, t in enumerate(inputs)}
        self.storages: dict[int, Any] = {}
        for i, t in enumerate(inputs):
            self.storages.setdefault(storage_key(t), _Ref(False, i))
        self.alive: list[Any] = list(inputs)
        self.steps: list[_Step] = []
        self.count = 0

    def ref(self, x: Any) -> Any:
        if isinstance(x, torch.SymFloat):
            return self.scalars.get(id(x), x)
        return self.refs[id(x)] if isinstance(x, torch.Tensor) else x

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for t in tree_flatten((args, kwargs))[0]:
            if isinstance(t, torch.Tensor) and id(t) not in self.refs:
                self._constant(t)
        seen_args, seen_kwargs = map_aggregate(args, self.ref), map_aggregate(kwargs, self.ref)
        out = func(*args, **kwargs)
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        if not outs and not _written(func, args, kwargs):
            return out
        writes = tuple(self.refs[id(t)] for t in _written(func, args, kwargs))
        self.steps.append(
            _Step(func, seen_args, seen_kwargs, self.count, self._made(outs), writes)
        )
        for t in outs:
            self.refs[id(t)] = _Ref(True, self.count)
            self.count += 1
        self.alive += [args, kwargs, out]
        return out

    def _made(self, outs: list[torch.Tensor]) -> tuple[_Made, ...]:
        made = []
        for t in outs:
            new = len(self.storages)
            made.append(_describe(t, self.storages.setdefault(storage_key(t), new)))
        return tuple(made)

    def _constant(self, t: torch.Tensor) -> None:
        """A tensor that no call made: a constant of the traced code."""
        self.steps.append(_Step("constant", (), {}, self.count, self._made([t]), ()))
        self.refs[id(t)] = _Ref(True, self.count)
        self.count += 1
        self.alive.append(t)


def _describe(t: torch.Tensor, storage: Any) -> _Made:
    return _Made(
        tuple(size_of(s) for s in t.shape),
        tuple(size_of(s) for s in t.stride()),
        size_of(t.storage_offset()),
        t.dtype,
        t.device,
        storage,
    )


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensor arguments that the op's schema says it writes to."""
    written = []
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is None or not a.alias_info.is_write:
            continue
        given = kwargs.get(a.name) if a.name in kwargs else args[i] if i < len(args) else None
        written += [t for t in tree_flatten(given)[0] if isinstance(t, torch.Tensor)]
    return written


# --- the walk -------------------------------------------------------------------------------------------------


class _Lens:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.view = View(gm.graph, [], {})
        self.templates: dict[Key, _Template | str] = {}
        self.keys: dict[int, int] = {}
        self.storages = 0
        self.autocast: list[tuple[Any, ...]] = []
        self.fake_mode = fake_mode_of(gm)

    def look(self) -> View:
        for node in self.gm.graph.nodes:
            if node.op == "output":
                continue
            self.view.results[node] = self._node(node)
        self.view.expansions = len(self.templates)
        return self.view

    def _node(self, node: fx.Node) -> Any:
        example = node.meta.get("example_value")
        if node.op == "placeholder":
            return self._given(node, example)
        if node.op == "get_attr":
            attribute = operator.attrgetter(node.target)(self.gm)
            if isinstance(attribute, torch.Tensor):
                return self._given(node, example if example is not None else attribute)
            return attribute
        if node.target in _AUTOCAST:
            return self._region(node)
        if example is None and any(self._slots(node)):
            return self._call(node, None)
        if not _has_tensor(example):
            return Scalar(node, example) if isinstance(example, torch.SymFloat) else example
        if node.target is operator.getitem and not isinstance(
            source := self.view.results[node.args[0]], Slot
        ):
            return source[node.args[1]]
        return self._call(node, example)

    def _slots(self, node: fx.Node) -> Iterator[Slot]:
        for arg in node.all_input_nodes:
            yield from slots_of(self.view.results[arg])

    def _given(self, node: fx.Node, example: Any) -> Any:
        def slot(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return self._slot(_describe(x, None), self._storage(x), node)

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

    def _slot(self, m: _Made, storage: int, node: fx.Node) -> Slot:
        return Slot(m.shape, m.stride, m.offset, m.dtype, m.device, storage, node)

    def _region(self, node: fx.Node) -> None:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            self.autocast.append(node.args)
        else:
            self.autocast.pop()
        self.view.calls.append(Call("region", (), {}, node))

    def _call(self, node: fx.Node, example: Any) -> Any:
        """Expand one call by its template; on any trouble it is opaque."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.view.results[n])
        if node.op == "call_function" and node.target in WHOLE:
            return self._whole(node, args, kwargs, example)
        if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
            return self._opaque(node, example, f"{node.target} is not read")
        flat, spec = tree_flatten((args, kwargs))
        inputs = list(dict.fromkeys(x for x in flat if isinstance(x, Slot)))
        try:
            key = (node.op, node.target, spec, tuple(self.autocast), *_key(flat, inputs))
            template = self.templates.get(key)
        except TypeError as error:
            return self._opaque(node, example, f"an argument that cannot be compared: {error}")
        if template is None:
            template = self.templates[key] = self._record(node, flat, spec, inputs, example)
        if isinstance(template, str):
            return self._opaque(node, example, template)
        return self._replay(node, template, inputs)

    def _whole(self, node: fx.Node, args: Any, kwargs: Any, example: Any) -> Any:
        slot = self._slot(_describe(example, None), self._new_storage(), node)
        self._add(Call(WHOLE[node.target], args, kwargs, node, (slot,)))
        return slot

    def _opaque(self, node: fx.Node, example: Any, reason: str) -> Any:
        def slot(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return self._slot(_describe(x, None), self._new_storage(), node)

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
    ) -> _Template | str:
        """Run one call on fresh fakes and write down what it calls; a text says why that was not possible."""
        try:
            with self.fake_mode, torch.no_grad(), without_guards(self.fake_mode):
                fakes = dict(zip(inputs, _fresh(inputs), strict=True))
                live = [
                    fakes[x] if isinstance(x, Slot) else x.example if isinstance(x, Scalar) else x
                    for x in flat
                ]
                args, kwargs = tree_unflatten(live, spec)
                scalars = [x for x in flat if isinstance(x, Scalar)]
                with self._autocast(), _Recorder(list(fakes.values()), scalars) as recorder:
                    if node.op == "call_method":
                        result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                    else:
                        assert callable(node.target)
                        result = node.target(*args, **kwargs)
                if example is not None and (difference := _difference(result, example)):
                    return difference
                return _Template(tuple(recorder.steps), map_aggregate(result, recorder.ref))
        except Exception as error:
            return f"cannot be expanded: {type(error).__name__}: {error}".splitlines()[0]

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled, cache in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled, cache))
            yield

    def _replay(self, node: fx.Node, template: _Template, inputs: list[Slot]) -> Any:
        made: list[Slot] = []
        new: dict[int, int] = {}

        def slot(x: Any) -> Any:
            return (made if x.inside else inputs)[x.number] if isinstance(x, _Ref) else x

        for step in template.steps:
            outs = []
            for m in step.made:
                if isinstance(m.storage, _Ref):
                    storage = slot(m.storage).storage
                else:
                    storage = new.get(m.storage) or new.setdefault(m.storage, self._new_storage())
                outs.append(self._slot(m, storage, node))
            args, kwargs = map_aggregate(step.args, slot), map_aggregate(step.kwargs, slot)
            writes = tuple(slot(r) for r in step.writes)
            made += outs
            self._add(Call(step.op, args, kwargs, node, tuple(outs), writes))
        return map_aggregate(template.result, slot)


_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)


def _key(flat: list[Any], inputs: list[Slot]) -> tuple[Any, ...]:
    """Everything an expansion can depend on, with sizes as expressions and aliases by their first holder."""
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


def _fresh(inputs: list[Slot]) -> list[torch.Tensor]:
    """New fakes with the inputs' metadata; those that share a storage share one here."""
    examples = [_example(s) for s in inputs]
    bases: dict[int, torch.Tensor] = {}
    result = []
    for slot, (shape, stride, offset) in zip(inputs, examples, strict=True):
        shared = sum(s.storage == slot.storage for s in inputs) > 1
        if not shared:
            fresh = torch.empty_strided(shape, stride, dtype=slot.dtype, device=slot.device)
        else:
            if slot.storage not in bases:
                bases[slot.storage] = torch.empty(1 << 40, dtype=slot.dtype, device=slot.device)
            if bases[slot.storage].dtype != slot.dtype:
                raise NotImplementedError("one storage under two dtypes")
            fresh = bases[slot.storage].as_strided(shape, stride, offset)
        result.append(fresh)
    return result


def _example(slot: Slot) -> tuple[list[Any], list[Any], Any]:
    def number(s: Size) -> Any:
        return s if isinstance(s, int) else symint_of(slot.node, s)

    return [*map(number, slot.shape)], [*map(number, slot.stride)], number(slot.offset)


def _difference(result: Any, example: Any) -> str:
    """What tells a result's metadata from what Dynamo saw; empty if nothing does."""
    got, want = tree_flatten(result)[0], tree_flatten(example)[0]
    for a, b in zip(got, want, strict=False):
        if not isinstance(b, torch.Tensor) or not isinstance(a, torch.Tensor):
            continue
        if a.dtype != b.dtype:
            return f"reads as {a.dtype} where the graph has {b.dtype}"
        if tuple(map(size_of, a.shape)) != tuple(map(size_of, b.shape)):
            return f"reads as {list(a.shape)} where the graph has {list(b.shape)}"
    return "" if len(got) == len(want) else "reads as another number of results"


def look(gm: fx.GraphModule) -> View:
    """Look at a Dynamo graph through the lens."""
    return _Lens(gm).look()
