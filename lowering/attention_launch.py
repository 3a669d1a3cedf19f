"""From operands of attention with one query row to one launch of its kernel, and the op's lowering.

Operands carry their strides as numbers, so the same code launches under Inductor and directly on
tensors.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import torch

from fxfuse import reference
from fxfuse.lowering.arch import arch_of
from fxfuse.lowering.launch import Launch, power_above
from fxfuse.lowering.operand import Operand
from fxfuse.lowering.providers import Box, Facts, arguments
from fxfuse.patterns.record import DecodeAttention

# Tensor cores multiply 16 rows and channels and more at once.
CORE = 16
# Slots of a mask, and elements of parts, that a thread reads at once.
SCANNED = 32
JOINED = 64
# Programs that fill a GPU, of one wave or two.
PROGRAMS = 256
# Slots of a program that takes all of them at once.
WHOLE = 64
# Bytes of k and v that a program holds at once: what AMD's local memory has room for, and others'.
SMALL_ROOM, ROOM = 2**16, 2**17
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 512
MAX_GROUP = 64


@dataclasses.dataclass(frozen=True)
class Block:
    """Slots that a program multiplies at once, its warps, how many such blocks are on their way at
    the same time, among how many programs the slots of a head of k are shared out (powers of two),
    and whether tensor cores multiply.
    """

    slots: int
    warps: int
    stages: int
    splits: int
    cores: bool = True


def room(target: str) -> int:
    return SMALL_ROOM if target.startswith("gfx") else ROOM


def block_for(rows: int, slots: int, row_bytes: int, target: str = "") -> Block:
    """The launch table, measured on an H200 (bfloat16, 64 to 256 channels, 512 to 16,384 slots):
    of B * G heads of k in all, each of so many slots, each slot so many bytes of k and v.
    """
    splits = max(1, PROGRAMS // power_above(rows))
    splits = min(splits, power_above(-(-slots // WHOLE)))
    at_once = max(CORE, min(WHOLE, SMALL_ROOM // row_bytes))
    whole = Block(1 << (at_once.bit_length() - 1), 4, 1, splits)
    several = Block(128, 4, 2, splits)
    if slots <= WHOLE * splits or several.slots * several.stages * row_bytes > room(target):
        return whole
    return several


def sizes(operands: Mapping[str, Operand | None]) -> tuple[int, int, int, int, int, int]:
    """B, H, G, S, D, Dv."""
    q, k, v = (_needed(operands, name) for name in "qkv")
    (batch, heads, _, channels), (_, kv_heads, slots, _) = q.shape, k.shape
    return batch, heads, kv_heads, slots, channels, v.shape[3]


def workspace(operands: Mapping[str, Operand | None], block: Block) -> tuple[tuple[int, ...], ...]:
    """The shapes of parts and stats, float32; none where the slots are not shared out."""
    batch, heads, kv_heads, *_, channels = sizes(operands)
    if block.splits == 1:
        return ()
    programs, group = batch * kv_heads * block.splits, heads // kv_heads
    return (programs, group, channels), (programs, 2, group)


def chosen(operands: Mapping[str, Operand | None], dtype: torch.dtype, target: str = "") -> Block:
    """The launch table's entry."""
    batch, _, kv_heads, slots, channels, v_channels = sizes(operands)
    return block_for(batch * kv_heads, slots, (channels + v_channels) * dtype.itemsize, target)


def plan(
    operands: Mapping[str, Operand | None],
    is_boolean: bool,
    scale: float | None,
    block: Block,
) -> Launch:
    """The launch for q, k, v, mask (or None), out [B, H, 1, Dv], dense, and, where the block
    shares out, parts, stats and counters.

    Shapes: as the op's, all of them numbers; a mask broadcasts to [B, H, 1, S].
    """
    batch, heads, kv_heads, slots, channels, v_channels = sizes(operands)
    q, k, v, out = (_needed(operands, name) for name in ("q", "k", "v", "out"))
    mask = operands.get("mask")
    arguments = {f"{n}_ptr": _needed(operands, n).value for n in ("q", "k", "v", "out")}
    # An absent operand is never touched; a pointer has to stand there all the same.
    arguments["mask_ptr"] = (mask or q).value
    for name in ("parts", "stats", "counters"):
        arguments[f"{name}_ptr"] = (operands.get(name) or out).value
    arguments["scale"] = 1 / math.sqrt(channels) if scale is None else scale
    steps = _broadcast(mask)
    group, kind = power_above(heads // kv_heads), (1 if is_boolean else 2) if mask else 0
    threads = 32 * block.warps
    scanned = SCANNED * threads if steps[1] == 0 else SCANNED * threads // group
    rows = max(CORE, group) if block.cores else group
    least = CORE if block.cores else 1
    width, v_width = (max(least, power_above(n)) for n in (channels, v_channels))
    constants = {
        "SIZES": (heads, kv_heads, slots, channels, v_channels),
        "STRIDES": (*(q.strides[i] for i in (0, 1, 3)), *k.strides, *v.strides, *steps),
        "MASK": kind,
        "SPLITS": block.splits,
        "SCAN": max(CORE, min(scanned, power_above(slots))),
        "HEADS": group,
        "ROWS": rows,
        "BLOCK_S": block.slots,
        "BLOCK_D": width,
        "BLOCK_DV": v_width,
        "CORES": block.cores,
        "AT_ONCE": min(block.splits, max(1, JOINED * threads // (group * v_width))),
        "STAGES": block.stages,
    }
    grid = (batch * kv_heads * block.splits, 1)
    return Launch("decode_attention", arguments, constants, grid, block.warps)


def _broadcast(mask: Operand | None) -> tuple[int, int, int]:
    """Steps of a mask from batch row to batch row, head to head, slot to slot."""
    if mask is None:
        return 0, 0, 0
    steps = (0,) * (4 - len(mask.shape)) + mask.steps(len(mask.shape))
    return steps[0], steps[1], steps[3]


def declines(facts: Facts) -> str | None:
    """Why the kernel does not take a call, or None."""
    record = facts.record
    assert isinstance(record, DecodeAttention)
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    made = {facts.dtypes[name] for name in "qkv" if name in facts.dtypes}
    if len(made) > 1 or not made <= set(DTYPES):
        names = (str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"the kernel knows {', '.join(names)} only, q, k and v alike"
    if max(record.channels, record.v_channels) > MAX_CHANNELS:
        return f"the kernel takes at most {MAX_CHANNELS} channels"
    if record.heads > MAX_GROUP * record.kv_heads:
        return f"the kernel takes at most {MAX_GROUP} query heads for one of k"
    if facts.batch is None:
        return "the number of batch rows is symbolic"
    return None


def lower(name: str, args: tuple[Any, ...], record: DecodeAttention) -> Box:
    """The result of fxfuse::decode_attention on boxes, by one launch of its kernel."""
    from fxfuse.lowering import inductor
    from fxfuse.lowering.fused import with_warps

    call = dict(zip(arguments(name), args, strict=True))
    q, mask = call["q"], call["mask"]
    operands: dict[str, Operand | None] = {
        n: inductor.operand(call[n]) for n in ("q", "k", "v", "mask") if call[n] is not None
    }
    numbers = [n for o in operands.values() if o for n in (*o.shape, *o.strides)]
    if not all(isinstance(n, int) for n in numbers):
        return loops(name, args, record)
    batch, heads, *_, channels = sizes(operands)
    out = inductor.empty(q, (batch, heads, 1, channels), q.get_dtype())
    if batch == 0:
        return out
    operands["out"] = inductor.operand(out)
    block = chosen(operands, q.get_dtype(), arch_of(q.get_device()))
    for place, shape in zip(("parts", "stats"), workspace(operands, block), strict=False):
        operands[place] = inductor.operand(inductor.empty(q, shape, torch.float32))
        operands["counters"] = inductor.operand(inductor.counters(q))
    is_boolean = mask is not None and mask.get_dtype() == torch.bool
    planned = plan(operands, is_boolean, call["scale"], block)
    inductor.launch(with_warps(planned.kernel, planned.warps), planned)
    return out


def loops(name: str, args: tuple[Any, ...], record: DecodeAttention) -> Box:
    """The reference through Inductor's own lowerings."""
    from fxfuse.lowering import inductor

    def run(q: Any, k: Any, v: Any, mask: Any, scale: Any, text: str) -> Any:
        return reference.decode_attention(q, k, v, mask, scale, record)

    return inductor.written(inductor.lower_graph(inductor.traced(run).graph, args))


def on_tensors(
    given: Mapping[str, torch.Tensor],
    scale: float | None,
    block: Block | None = None,
    target: str = "",
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch on tensors as they are, its result, and its counters."""
    operands: dict[str, Operand | None] = {n: Operand.of(x) for n, x in given.items()}
    q = given["q"]
    block = block or chosen(operands, q.dtype, target or arch_of(q.device))
    batch, heads, *_, channels = sizes(operands)
    made = {"out": q.new_empty((batch, heads, 1, channels))}
    for name, shape in zip(("parts", "stats"), workspace(operands, block), strict=False):
        made[name] = q.new_empty(shape, dtype=torch.float32)
    if block.splits > 1:
        made["counters"] = q.new_zeros(batch * heads, dtype=torch.int32)
    else:
        made["counters"] = q.new_empty(0, dtype=torch.int32)
    operands |= {n: Operand.of(x) for n, x in made.items()}
    is_boolean = "mask" in given and given["mask"].dtype == torch.bool
    return plan(operands, is_boolean, scale, block), made["out"], made["counters"]


def _needed(operands: Mapping[str, Operand | None], name: str) -> Operand:
    operand = operands.get(name)
    assert operand is not None, name
    return operand
