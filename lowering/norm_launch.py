"""From an AddNorm record and its operands to one launch of its kernel, and the op's lowering.

Operands carry their strides as numbers or symbolic expressions, so the same code launches under
Inductor and directly on tensors.
"""

import functools
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import torch

import fxfuse.add_norm
from fxfuse import reference
from fxfuse.lowering.launch import Launch, ceil_div, power_above
from fxfuse.lowering.operand import Operand, Size
from fxfuse.lowering.providers import Box, Facts
from fxfuse.patterns.record import AddNorm

MAX_CHANNELS = 16384
ADDENDS = ("x", "residual", "second")
ARGUMENTS = tuple(inspect.signature(fxfuse.add_norm.add_rms_norm).parameters)

# Up to how many rows, elements in a program's tile: few rows want a program each, many rows of few
# channels share one.
TABLE = ((1024, 1), (None, 4096))

# A dtype's number in the kernel.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def plan(
    record: AddNorm,
    operands: Mapping[str, Operand | None],
    dtypes: tuple[torch.dtype, ...],
    eps: float,
    rows: int,
) -> Launch:
    """The launch for operands named as the op's arguments, with sum (where kept) and out.

    Shapes: addends [T, D] or [B, T, D]. dtypes are the addends'; rows is B * T or a guess of it.
    """
    found = [operands.get(name) for name in ADDENDS]
    x, out, weight = found[0], operands.get("out"), operands.get("weight")
    assert x is not None and out is not None
    elements = next(n for most, n in TABLE if most is None or rows <= most)
    block = power_above(record.channels)
    batch, tokens = _rows(x.shape)
    tile_rows = max(1, elements // block)
    # An absent operand is never touched; a pointer has to stand there all the same.
    arguments = {f"{n}_ptr": (o or x).value for n, o in zip(ADDENDS, found, strict=True)}
    arguments |= {"weight_ptr": (weight or x).value}
    arguments |= {"sum_ptr": (operands.get("sum") or out).value, "out_ptr": out.value}
    for letter, operand in zip("xrs", found, strict=True):
        arguments |= _strides(letter, operand)
    arguments |= {"eps": eps, "T": tokens}
    first = functools.reduce(torch.promote_types, dtypes[:2])
    total = functools.reduce(torch.promote_types, dtypes)
    constants = {
        "D": record.channels,
        "BLOCK": block,
        "ROWS": tile_rows,
        "ADDENDS": record.addends,
        "FIRST_DTYPE": DTYPES[first],
        "SUM_DTYPE": DTYPES[total],
        "KEEP_SUM": record.keep_sum,
        "HAS_WEIGHT": weight is not None,
        "OFFSET": record.norm.weight_offset,
    }
    grid = (ceil_div(tokens, tile_rows), batch)
    return Launch("add_rms_norm", arguments, constants, grid, _warps(block * tile_rows))


def _warps(elements: int) -> int:
    """Warps of a program: 16 elements a thread of 32, from 4 to 16."""
    return min(16, max(4, elements // 512))


def _rows(shape: tuple[Size, ...]) -> tuple[Size, Size]:
    """Batch and tokens; a batch of single tokens is tokens."""
    batch, tokens = shape[0] if len(shape) == 3 else 1, shape[-2]
    return (tokens, batch) if _is_one(tokens) else (batch, tokens)


def _is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def _strides(letter: str, operand: Operand | None) -> dict[str, Size]:
    b, t, d = (0, 0, 0)
    if operand is not None:
        b = operand.strides[0] if len(operand.shape) == 3 else 0
        t, d = operand.strides[-2:]
        b, t = (t, b) if _is_one(operand.shape[-2]) else (b, t)
    return {f"stride_{letter}b": b, f"stride_{letter}t": t, f"stride_{letter}d": d}


def declines(facts: Facts) -> str | None:
    """Why the kernel does not take a call, or None."""
    record, shape = facts.record, facts.shape
    assert isinstance(record, AddNorm)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    addends = [facts.dtypes[name] for name in ADDENDS if name in facts.dtypes]
    if any(dtype not in DTYPES for dtype in (getattr(torch, record.dtype), *addends)):
        names = (str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"the kernel knows {', '.join(names)} only"
    if record.channels > MAX_CHANNELS:
        return f"the kernel takes at most {MAX_CHANNELS} channels"
    if len(shape) not in (2, 3):
        return "the kernel takes rows of one or two axes"
    if isinstance(batch := _rows(shape)[0], int) and batch >= 2**16:
        return "a grid has at most 65535 batch rows"
    return None


def _named(args: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[torch.dtype, ...]]:
    """Boxes by the names of the op's arguments, and the dtypes of the addends."""
    call = dict(zip(ARGUMENTS, args, strict=True))
    return call, tuple(call[name].get_dtype() for name in ADDENDS if call[name] is not None)


def lower(name: str, args: tuple[Any, ...], record: AddNorm) -> tuple[Box, Box]:
    """Results of fxfuse::add_rms_norm on boxes, by one launch of its kernel."""
    from fxfuse.lowering import inductor

    call, dtypes = _named(args)
    x = call["x"]
    shape = inductor.sizes(x.get_size())
    operands: dict[str, Operand | None] = {
        n: inductor.operand(call[n]) for n in ADDENDS if call[n] is not None
    }
    if call["weight"] is not None:
        operands["weight"] = inductor.contiguous_operand(call["weight"])
    out = inductor.empty(x, shape, getattr(torch, record.dtype))
    total_dtype = functools.reduce(torch.promote_types, dtypes)
    total = inductor.empty(x, shape if record.keep_sum else (0,), total_dtype)
    if 0 in shape:
        return total, out
    operands["out"] = inductor.operand(out)
    if record.keep_sum:
        operands["sum"] = inductor.operand(total)
    rows = 1
    for size in shape[:-1]:
        rows *= inductor.hint(size)
    launch = plan(record, operands, dtypes, call["eps"], rows)
    inductor.launch(_with_warps(launch.warps), launch)
    return total, out


@functools.cache
def _with_warps(warps: int) -> Any:
    """The kernel with its warps pinned: Inductor takes them from a sole autotuning config."""
    import triton

    from fxfuse.lowering import norm_kernels

    config = triton.Config({}, num_warps=warps, num_stages=1)
    return triton.autotune(configs=[config], key=[])(norm_kernels.add_rms_norm)


def loops(name: str, args: tuple[Any, ...], record: AddNorm) -> tuple[Box, Box]:
    """The reference through Inductor's own lowerings, rounded as Inductor rounds any model."""
    from fxfuse.lowering import inductor

    call, dtypes = _named(args)

    def run(*tensors: Any) -> Any:
        total, out = reference.add_rms_norm(*(*tensors[:-1], record))
        return (total.clone() if record.addends == 1 else total), out

    total, out = inductor.lower_graph(inductor.traced(run).graph, list(call.values()))
    dtype = functools.reduce(torch.promote_types, dtypes)
    if not record.keep_sum:
        return inductor.empty(call["x"], (0,), dtype), inductor.written(out)
    return inductor.written(total), inductor.written(out)


def launch_on(
    record: AddNorm, tensors: Mapping[str, torch.Tensor | None], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel on tensors named as the op's arguments: for benchmarks and tests."""
    from fxfuse.lowering import norm_kernels

    given = {n: t for n, t in tensors.items() if t is not None}
    addends = [given[n] for n in ADDENDS if n in given]
    results = fxfuse.add_norm.empty_results(addends, record)
    given |= {"out": results[1]} | ({"sum": results[0]} if record.keep_sum else {})
    operands = {n: Operand.of(t) for n, t in given.items()}
    x = addends[0]
    dtypes = tuple(a.dtype for a in addends)
    kernel: Any = norm_kernels.add_rms_norm
    if x.numel():
        launch = plan(record, operands, dtypes, eps, x.numel() // record.channels)
        kernel[launch.grid](**launch.arguments, **launch.constants, num_warps=launch.warps)
    return results
