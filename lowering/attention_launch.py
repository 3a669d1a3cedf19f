"""From operands of attention with one query row to one launch of its kernel.

Operands carry their strides as numbers, so the same code launches under Inductor and directly on
tensors.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch

from fxfuse.lowering.launch import Launch, power_above
from fxfuse.lowering.operand import Operand

# Tensor cores multiply 16 rows and channels and more at once.
CORE = 16
# Slots of a mask that a thread reads at once, and elements of parts that are added at once.
SCANNED = 16
JOINED = 8192


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


def block_for(rows: int, heads: int, channels: int) -> Block:
    """The launch table: of B * G heads of k in all, each read by so many of q."""
    splits = power_above(-(-256 // rows)) if rows <= 128 else 1
    return Block(64 if channels <= 128 else 32, 4, 2, min(splits, 64))


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


def chosen(operands: Mapping[str, Operand | None]) -> Block:
    """The launch table's entry."""
    batch, heads, kv_heads, _, channels, v_channels = sizes(operands)
    return block_for(batch * kv_heads, heads // kv_heads, max(channels, v_channels))


def plan(
    operands: Mapping[str, Operand | None],
    is_boolean: bool,
    scale: float | None,
    block: Block | None = None,
) -> Launch:
    """The launch for q, k, v, mask (or None), out [B, H, 1, Dv], dense, and, where the block
    shares out, parts, stats and counters.

    Shapes: as the op's, all of them numbers; a mask broadcasts to [B, H, 1, S].
    """
    block = block or chosen(operands)
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
        "AT_ONCE": min(block.splits, max(1, JOINED // (group * v_width))),
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


def tensors(
    given: Mapping[str, torch.Tensor], scale: float | None, block: Block | None = None
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch on tensors as they are, its result, and its counters."""
    operands: dict[str, Operand | None] = {n: _operand(x) for n, x in given.items()}
    block = block or chosen(operands)
    batch, heads, *_, channels = sizes(operands)
    q = given["q"]
    made = {"out": q.new_empty((batch, heads, 1, channels))}
    for name, shape in zip(("parts", "stats"), workspace(operands, block), strict=False):
        made[name] = q.new_empty(shape, dtype=torch.float32)
    made["counters"] = q.new_zeros(batch * heads, dtype=torch.int32)
    operands |= {n: _operand(x) for n, x in made.items()}
    is_boolean = "mask" in given and given["mask"].dtype == torch.bool
    return plan(operands, is_boolean, scale, block), made["out"], made["counters"]


def _operand(x: torch.Tensor) -> Operand:
    return Operand(x, tuple(x.shape), x.stride())


def _needed(operands: Mapping[str, Operand | None], name: str) -> Operand:
    operand = operands.get(name)
    assert operand is not None, name
    return operand
