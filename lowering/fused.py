"""The Triton provider: one launch of the kernel for an op call.

In come the boxes of one op call; out come the boxes of its results, written by the kernel.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from fxfuse.lowering import inductor, launch, loops, projection_launch
from fxfuse.lowering.arch import arch_of
from fxfuse.lowering.operand import Operand
from fxfuse.lowering.providers import arguments
from fxfuse.patterns.record import Record, Stream

# Read from anywhere in memory; the others are small and made contiguous.
CONTIGUOUS = ("q_weight", "k_weight", "q_bias", "k_bias", "x", "residual", "x_weight")

NUMBERS = ("x_eps", "q_eps", "k_eps", "record")


def lower(name: str, args: tuple[Any, ...], record: Record) -> tuple[Any, ...]:
    """Results of fxfuse::<name> on boxes, by one kernel launch."""
    call = dict(zip(arguments(name), args, strict=True))
    caches = [call[c] for c in ("k_cache", "v_cache") if call.get(c) is not None]
    # A copy would take the writes in the cache's place.
    if not all(inductor.is_memory(cache) for cache in caches):
        return loops.lower(name, args, record)
    # The kernel holds the length of a table that is looked up as a constant.
    length = 0 if call["positions"] is None else inductor.sizes(call["cos"].get_size())[1]
    if not isinstance(length, int):
        return loops.lower(name, args, record)
    boxes = {n: x for n, x in call.items() if n not in NUMBERS and x}
    operands: dict[str, Operand | None] = {
        n: inductor.contiguous_operand(x) if n in CONTIGUOUS else inductor.operand(x)
        for n, x in boxes.items()
    }
    q, k = _sizes(call)
    like = call["x"] if record.projected else call["q"]
    q_out, operands["q_out"] = _result(like, q, record.q)
    if k is None or record.k is None or not record.k.keep:
        k_out = inductor.empty(like, (0,), like.get_dtype())
    else:
        k_out, operands["k_out"] = _result(like, k, record.k)
    results = (q_out, k_out, *_sums(call, operands, record))
    if 0 in q[:2]:
        return results
    plan = _planned(call, operands, record, inductor.hint(q[1]))
    if plan is None:
        return loops.lower(name, args, record)
    inductor.launch(with_warps(plan.kernel, plan.warps), plan)
    return results


def _sums(
    call: dict[str, Any], operands: dict[str, Operand | None], record: Record
) -> tuple[Any, ...]:
    """The third result of a projection: memory for the sum in front of it, where that is kept."""
    if not record.projected:
        return ()
    x = call["x"]
    if record.front is None or not record.front.keep_sum:
        return (inductor.empty(x, (0,), x.get_dtype()),)
    total = inductor.empty(x, x.get_size(), x.get_dtype())
    operands["x_sum"] = inductor.operand(total)
    return (total,)


def _sizes(call: dict[str, Any]) -> tuple[Sequence[Any], Sequence[Any] | None]:
    """[B, T, heads, D] of q and of k."""
    if "x" not in call:
        return call["q"].get_size(), call["k"].get_size() if call["k"] else None
    rows = call["x"].get_size()[:2]
    q, k = (call[name] for name in ("q_proj", "k_proj"))
    return (*rows, *q.get_size()[:2]), (*rows, *k.get_size()[:2]) if k else None


def _planned(
    call: dict[str, Any], operands: dict[str, Operand | None], record: Record, tokens: int
) -> launch.Launch | None:
    """The launch; None where the projection's kernel is asked for other sizes than numbers, or for
    more rows with a norm in front than it takes.
    """
    like, eps = call["x" if record.projected else "q"], (call["q_eps"], call["k_eps"])
    target = arch_of(like.get_device())
    if not record.projected:
        return launch.plan(record, operands, eps, tokens, target)
    sizes = [n for o in operands.values() if o for n in (*o.shape, *o.strides)]
    heads = sum(heads for heads, _ in projection_launch.widths(operands).values())
    if not all(isinstance(n, int) for n in sizes) or heads > inductor.COUNTERS:
        return None
    rows = math.prod(like.get_size()[:2])
    if record.front is not None and rows > projection_launch.NORMED_ROWS:
        return None
    shape = projection_launch.sums_shape(operands, rows)
    operands["sums"] = inductor.operand(inductor.empty(like, shape, torch.float32))
    operands["counters"] = inductor.operand(inductor.counters(like))
    return projection_launch.plan(record, operands, eps, target, x_eps=call["x_eps"])


def _result(like: Any, size: Sequence[Any], stream: Stream) -> tuple[Any, Operand]:
    """Memory for one result: its box as [B, T, H, D], and the operand the kernel writes."""
    b, t, h, d = size
    shape = (b, h, t, d) if stream.heads_first else (b, t, h, d)
    memory = inductor.empty(like, shape, getattr(torch, stream.dtype))
    box = inductor.permuted(memory, (0, 2, 1, 3)) if stream.heads_first else memory
    return box, inductor.operand(memory)


@functools.cache
def with_warps(kernel: str, warps: int) -> Any:
    """A kernel with its warps pinned: Inductor takes them from a sole autotuning config."""
    import triton

    config = triton.Config({}, num_warps=warps, num_stages=1)
    return triton.autotune(configs=[config], key=[])(launch.kernel_of(kernel))
