"""Expansions: the ATen calls one Dynamo call makes, recorded once and replayed as a template.

A call is run on fresh fake tensors under a recording dispatch mode. Its template names inputs and
intermediate tensors by number, so that it serves every call with equal inputs' metadata.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fxfuse.slots import Scalar, Size, Slot
from fxfuse.torch_private import size_of, storage_key, symint_of


@dataclasses.dataclass(frozen=True)
class Ref:
    """An input of a recorded expansion, or a tensor made inside it."""

    inside: bool
    number: int


@dataclasses.dataclass(frozen=True)
class Made:
    """A tensor made inside an expansion; storage: the Ref whose storage it shares, or a number of
    a new one."""

    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size
    dtype: torch.dtype
    device: torch.device
    storage: Any


@dataclasses.dataclass(frozen=True)
class Step:
    op: Any
    args: Any
    kwargs: Any
    first: int
    made: tuple[Made, ...]
    writes: tuple[Ref, ...]


@dataclasses.dataclass(frozen=True)
class Template:
    steps: tuple[Step, ...]
    result: Any


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each ATen call made under it."""

    def __init__(self, inputs: list[torch.Tensor], scalars: list[Scalar]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scalars = {id(x.example): x for x in scalars}
        self.refs = {id(t): Ref(False, i) for i, t in enumerate(inputs)}
        self.storages: dict[int, Any] = {}
        for i, t in enumerate(inputs):
            self.storages.setdefault(storage_key(t), Ref(False, i))
        self.alive: list[Any] = list(inputs)
        self.steps: list[Step] = []
        self.count = 0

    def ref(self, x: Any) -> Any:
        if isinstance(x, torch.SymFloat):
            return self.scalars.get(id(x), x)
        return self.refs[id(x)] if isinstance(x, torch.Tensor) else x

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for t in tree_flatten((args, kwargs))[0]:
            if isinstance(t, torch.Tensor) and id(t) not in self.refs:
                self._constant(t)
        seen_args, seen_kwargs = map_aggregate(args, self.ref), map_aggregate(kwargs, self.ref)
        out = func(*args, **kwargs)
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        if not outs and not written(func, args, kwargs):
            return out
        writes = tuple(self.refs[id(t)] for t in written(func, args, kwargs))
        self.steps.append(Step(func, seen_args, seen_kwargs, self.count, self._made(outs), writes))
        for t in outs:
            self.refs[id(t)] = Ref(True, self.count)
            self.count += 1
        self.alive += [args, kwargs, out]
        return out

    def _made(self, outs: list[torch.Tensor]) -> tuple[Made, ...]:
        made = []
        for t in outs:
            new = len(self.storages)
            made.append(describe(t, self.storages.setdefault(storage_key(t), new)))
        return tuple(made)

    def _constant(self, t: torch.Tensor) -> None:
        """A tensor that no call made: a constant of the traced code."""
        self.steps.append(Step("constant", (), {}, self.count, self._made([t]), ()))
        self.refs[id(t)] = Ref(True, self.count)
        self.count += 1
        self.alive.append(t)


def describe(t: torch.Tensor, storage: Any) -> Made:
    return Made(
        tuple(size_of(s) for s in t.shape),
        tuple(size_of(s) for s in t.stride()),
        size_of(t.storage_offset()),
        t.dtype,
        t.device,
        storage,
    )


def written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensor arguments that the op's schema says it writes to."""
    written = []
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is None or not a.alias_info.is_write:
            continue
        given = kwargs.get(a.name) if a.name in kwargs else args[i] if i < len(args) else None
        written += [t for t in tree_flatten(given)[0] if isinstance(t, torch.Tensor)]
    return written


def fresh(inputs: Sequence[Slot]) -> list[torch.Tensor]:
    """New fakes with the inputs' metadata; those that share a storage share one here."""
    examples = [_example(s) for s in inputs]
    bases: dict[int, torch.Tensor] = {}
    result = []
    for slot, (shape, stride, offset) in zip(inputs, examples, strict=True):
        shared = sum(s.storage == slot.storage for s in inputs) > 1
        if not shared:
            new = torch.empty_strided(shape, stride, dtype=slot.dtype, device=slot.device)
        else:
            if slot.storage not in bases:
                bases[slot.storage] = torch.empty(1 << 40, dtype=slot.dtype, device=slot.device)
            if bases[slot.storage].dtype != slot.dtype:
                raise NotImplementedError("one storage under two dtypes")
            new = bases[slot.storage].as_strided(shape, stride, offset)
        result.append(new)
    return result


def _example(slot: Slot) -> tuple[list[Any], list[Any], Any]:
    def number(s: Size) -> Any:
        return s if isinstance(s, int) else symint_of(slot.node, s)

    return [*map(number, slot.shape)], [*map(number, slot.stride)], number(slot.offset)


def difference(result: Any, example: Any) -> str:
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
