"""Our own providers, entered into the table in turn: the last one is asked first.

Loops take every call on every device, Triton's kernels those that they know on a GPU, other
libraries those whose kernels compute exactly what the op does.
"""

import importlib.util
from typing import Any

import torch

from fxfuse.lowering import attention_launch, libraries, norm_launch
from fxfuse.lowering.launch import KINDS, axis_runs
from fxfuse.lowering.providers import Box, Facts, register_provider
from fxfuse.patterns.record import Record

KERNEL_DTYPES = ("float32", "float16", "bfloat16")
KERNEL_NORMS = tuple(KINDS)
ROPE_OPS = ("norm_rope", "norm_rope_store_")
# Each is a position loaded and a choice for every pair; the maps in use are of up to five.
MAX_AXIS_RUNS = 12


def _no_triton_kernel(facts: Facts) -> str | None:
    record = facts.record
    assert isinstance(record, Record)
    q, k, v = record.q, record.k, record.v
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if any(s is not None and s.dtype not in KERNEL_DTYPES for s in (q, k, v)):
        return f"the kernel writes {', '.join(KERNEL_DTYPES)} only"
    norms = [s.norm for s in (q, k, v) if s is not None and s.norm is not None]
    if any(n.kind not in KERNEL_NORMS for n in norms):
        return f"the kernel knows the norm kinds {', '.join(KERNEL_NORMS)} only"
    if q.rotation is not None and q.rotation.by_head:
        return "each head turns by tables of its own"
    turns = [s.rotation for s in (q, k) if s is not None and s.rotation is not None]
    if len({turn.axes for turn in turns}) > 1:
        return "q and k turn by different axes"
    if axis_runs(record)[0] > MAX_AXIS_RUNS:
        return f"the axes of the pairs are more than {MAX_AXIS_RUNS} runs"
    if any(s is not None and len(s.passes) > 2 for s in (q, k, v)):
        return "the kernel passes at most two runs of channels through"
    if v is not None and (v.rotation or v.has_scale or v.scale != 1.0):
        return "the kernel copies v, or norms it"
    expected = (True, k is not None, v is not None)
    if any(n is None for n, there in zip(facts.heads, expected, strict=True) if there):
        return "a head count is symbolic"
    if k is not None and v is not None and facts.heads[1] != facts.heads[2]:
        return "k and v differ in heads"
    if facts.batch is not None and facts.batch >= 2**16:
        return "a grid has at most 65535 batch rows"
    return _no_format(record, facts.device)


def _no_format(record: Record, device: torch.device | None) -> str | None:
    """Why Triton cannot cast to a cache's 8-bit format there: AMD's targets know every format,
    NVIDIA's e5m2, and e4m3fn from compute capability 8.9 on.
    """
    if record.store is None or torch.version.hip or not torch.cuda.is_available():
        return None
    known = {"", "float8_e5m2"}
    if torch.cuda.get_device_capability(device) >= (8, 9):
        known.add("float8_e4m3fn")
    for layout in (record.store.k, record.store.v):
        if layout.cast.dtype not in known:
            return f"Triton does not cast to {layout.cast.dtype} on this GPU"
    return None


def _no_projection_kernel(facts: Facts) -> str | None:
    front = ("x", "residual")
    made = {x for name, x in facts.dtypes.items() if name in front or name.endswith("_proj")}
    if len(made) > 1 or any(str(x).removeprefix("torch.") not in KERNEL_DTYPES for x in made):
        return f"the kernel multiplies {', '.join(KERNEL_DTYPES)} only, x and weights alike"
    return _no_triton_kernel(facts)


def _triton(name: str, args: tuple[Any, ...], record: Record) -> tuple[Box, ...]:
    from fxfuse.lowering import fused

    return fused.lower(name, args, record)


def _loops(name: str, args: tuple[Any, ...], record: Record) -> tuple[Box, ...]:
    from fxfuse.lowering import loops

    return loops.lower(name, args, record)


NORM = "add_rms_norm"
ATTENTION = "decode_attention"
PROJECTION = "project_norm_rope_store_"

register_provider("loops", lower=_loops, ops=(*ROPE_OPS, PROJECTION), version="")
register_provider(
    "triton", lower=_triton, ops=ROPE_OPS, devices=("cuda",), declines=_no_triton_kernel, version=""
)
register_provider(
    "triton",
    lower=_triton,
    ops=(PROJECTION,),
    devices=("cuda",),
    declines=_no_projection_kernel,
    version="",
)
register_provider("loops", lower=norm_launch.loops, ops=(NORM,), version="")
register_provider(
    "triton",
    lower=norm_launch.lower,
    ops=(NORM,),
    devices=("cuda",),
    declines=norm_launch.declines,
    version="",
)
register_provider("loops", lower=attention_launch.loops, ops=(ATTENTION,), version="")
register_provider(
    "triton",
    lower=attention_launch.lower,
    ops=(ATTENTION,),
    devices=("cuda",),
    declines=attention_launch.declines,
    version="",
)
for _library in libraries.LIBRARIES:
    libraries.enter(_library)
