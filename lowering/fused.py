"""The Triton provider: one launch of the kernel for an op call.

In come the boxes of one op call; out come the boxes of its results, written by the kernel.
"""

import functools
import inspect
from typing import Any

import torch

import fxfuse.ops
from fxfuse.lowering import inductor, kernels, launch, loops
from fxfuse.lowering.operand import Operand
from fxfuse.patterns.record import Record, Stream

# Read from anywhere in memory; the others are small and made contiguous.
CONTIGUOUS = ("q_weight", "k_weight", "q_bias", "k_bias")


def lower(name: str, args: tuple[Any, ...], record: Record) -> tuple[Any, Any]:
    """Results of fxfuse::<name> on boxes, by one kernel launch."""
    call = dict(zip(ARGUMENTS[name], args, strict=True))
    caches = [call[c] for c in ("k_cache", "v_cache") if call.get(c) is not None]
    # A copy would take the writes in the cache's place.
    if not all(inductor.is_memory(cache) for cache in caches):
        return loops.lower(name, args, record)
    # The kernel holds the length of a table that is looked up as a constant.
    length = 0 if call["positions"] is None else inductor.sizes(call["cos"].get_size())[1]
    if not isinstance(length, int):
        return loops.lower(name, args, record)
    boxes = {n: x for n, x in call.items() if n not in ("q_eps", "k_eps", "record") and x}
    operands: dict[str, Operand | None] = {
        n: inductor.contiguous_operand(x) if n in CONTIGUOUS else inductor.operand(x)
        for n, x in boxes.items()
    }
    q_out, operands["q_out"] = _result(call["q"], record.q)
    if call["k"] is None or record.k is None or not record.k.keep:
        k_out = inductor.empty(call["q"], (0,), call["q"].get_dtype())
    else:
        k_out, operands["k_out"] = _result(call["k"], record.k)
    if 0 in (q_out.get_size()[0], q_out.get_size()[1]):
        return q_out, k_out
    tokens = inductor.hint(q_out.get_size()[1])
    target = target_of(call["q"].get_device())
    plan = launch.plan(record, operands, (call["q_eps"], call["k_eps"]), tokens, target)
    inductor.launch(with_warps(plan.kernel, plan.warps), plan)
    return q_out, k_out


@functools.cache
def target_of(device: torch.device) -> str:
    """A GPU's target, as the launch tables name it: sm_90, gfx942."""
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _result(x: Any, stream: Stream) -> tuple[Any, Operand]:
    """Memory for one result: its box as [B, T, H, D], and the operand the kernel writes."""
    b, t, h, d = x.get_size()
    shape = (b, h, t, d) if stream.heads_first else (b, t, h, d)
    memory = inductor.empty(x, shape, getattr(torch, stream.dtype))
    box = inductor.permuted(memory, (0, 2, 1, 3)) if stream.heads_first else memory
    return box, inductor.operand(memory)


@functools.cache
def with_warps(kernel: str, warps: int) -> Any:
    """A kernel with its warps pinned: Inductor takes them from a sole autotuning config."""
    import triton

    config = triton.Config({}, num_warps=warps, num_stages=1)
    return triton.autotune(configs=[config], key=[])(getattr(kernels, kernel))


ARGUMENTS = {
    "norm_rope": tuple(inspect.signature(fxfuse.ops.norm_rope).parameters),
    "norm_rope_store_": tuple(inspect.signature(fxfuse.ops.norm_rope_store_).parameters),
}
