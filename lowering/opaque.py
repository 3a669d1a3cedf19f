"""A provider's plain function of tensors as ops of torch: graphs call it and do not look into it.

In come a function and the names of fxfuse ops; out comes a lowering that puts a call of it where
such an op stood. What it returns is brought to the op's layout; where it raises, the op's reference
runs in its place, from then on.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

library: Any = torch.library.Library("fxfuse_provider", "FRAGMENT")  # type: ignore[no-untyped-call]

Run = Callable[..., "Tensor | tuple[Tensor | None, ...]"]
Failed = Callable[[str, Exception], None]

# By the name of its op, what runs and whom to tell that it raised; a compiled graph may call it as
# long as the process lives.
_functions: dict[str, tuple[Run, Failed] | None] = {}


def entered(key: str, names: Iterable[str], run: Run, failed: Failed) -> Callable[..., Any]:
    """A lowering of the named fxfuse ops to calls of `run`; equal keys mean equal code."""
    ops = {name: _defined(f"{key}_{name}", name) for name in sorted(names)}
    for name in ops:
        _functions[f"{key}_{name}"] = (run, failed)

    def lower(name: str, args: tuple[Any, ...], record: Any) -> Any:
        from fxfuse.lowering import inductor, loops

        schema = ops[name]._schema.arguments
        written = [x for x, a in zip(args, schema, strict=True) if a.is_write and x is not None]
        # A copy would take the writes in the cache's place.
        if not all(map(inductor.is_memory, written)):
            return loops.lower(name, args, record)
        # Inductor's C++ wrapper writes a string as it is between quotes.
        return inductor.call(ops[name], (*args[:-1], args[-1].replace('"', "'")))

    return lower


def _defined(key: str, name: str) -> Any:
    """torch.ops.fxfuse_provider.<key>, with the schema and the results of fxfuse::<name>."""
    if key not in _functions:
        op = getattr(torch.ops.fxfuse, name).default
        schema = str(op._schema).replace(f"fxfuse::{name}", key, 1)
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(key, functools.partial(_call, key, op), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"fxfuse_provider::{key}", lambda *args: op(*_as_given(args)), lib=library
        )
    return getattr(torch.ops.fxfuse_provider, key).default


def _call(key: str, op: Any, *args: Any) -> Any:
    from fxfuse.lowering.providers import OPS, arguments

    name, args = op._schema.name.removeprefix("fxfuse::"), _as_given(args)
    if (function := _functions[key]) is not None:
        run, failed = function
        try:
            named = dict(zip(arguments(name), args, strict=True))
            results = run(**named | {"record": OPS[name](named["record"])})
            return _laid_out(op, results, args)
        except Exception as error:
            _functions[key] = None
            failed("running", error)
    return op(*args)


def _as_given(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the op from those of a call in a compiled graph."""
    return (*args[:-1], args[-1].replace("'", '"'))


def _laid_out(op: Any, results: Any, args: tuple[Any, ...]) -> Any:
    """Results in the memory order that the op promises, none of them memory of an argument; the
    tensor itself of an op that returns one.
    """
    wanted = _promised(op, tuple(map(_metadata, args)))
    if is_sole := len(op._schema.returns) == 1:
        results = (results,)
    if not isinstance(results, tuple) or len(results) != len(wanted):
        raise TypeError(f"got {type(results).__name__}, wanted a tuple of {len(wanted)} results")
    taken = {_memory(x) for x in args if isinstance(x, Tensor)}
    found = []
    for i, (x, (shape, stride, dtype, device)) in enumerate(zip(results, wanted, strict=True)):
        if 0 in shape:
            x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        elif not isinstance(x, Tensor) or x.shape != shape or x.dtype != dtype:
            got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"result {i}: got {got}, wanted {shape} {dtype}")
        elif x.stride() != stride or _memory(x) in taken:
            x = torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(x)
        taken.add(_memory(x))
        found.append(x)
    return found[0] if is_sole else tuple(found)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _metadata(x: Any) -> Any:
    return (tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x


@functools.lru_cache(maxsize=1024)
def _promised(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Metadata of an op's results, from that of its arguments."""

    def without_data(x: Any) -> Any:
        if not isinstance(x, tuple):
            return x
        shape, stride, dtype, _ = x
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    device = next(x[3] for x in args if isinstance(x, tuple))
    results = op(*map(without_data, args))
    results = (results,) if isinstance(results, Tensor) else results
    return tuple((tuple(r.shape), r.stride(), r.dtype, device) for r in results)
