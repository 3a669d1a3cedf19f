"""From a record and its operands to one launch of the projection's kernel.

What stands behind the projection is planned as for tensors q, k and v: they are parts of the
kernel's workspace here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fxfuse.lowering import launch
from fxfuse.lowering.operand import Operand, Size
from fxfuse.lowering.tiles import Tile
from fxfuse.patterns.record import Record

STREAMS = ("q", "k", "v")
# Rows of more tokens than one are multiplied by tensor cores, which take 16 and more at once.
CORE_ROWS = 16
TINY_HIDDEN, SMALL_HIDDEN = 1024, 2048
# Hidden sizes that were faster in smaller blocks, of those from 1024 to 5120 that were measured.
NARROW = (2048, 2880, 4096)
# Programs of one warp and up to 168 registers that an H200 has places for at once: 12 an SM.
PLACES = 12 * 132
# Rows that the kernel norms.
NORMED_ROWS = 1
# Elements of a head's batch rows that a warp norms and rotates together.
ELEMENTS = 1024


@dataclasses.dataclass(frozen=True)
class Block:
    """What a program multiplies at once, rows x hidden channels of a weight (powers of two), its
    warps, and how many such blocks are on their way at the same time.
    """

    rows: int
    hidden: int
    warps: int
    stages: int


def block_for(tokens: int, hidden: int, channels: int, front: bool = False) -> Block:
    """The launch table, measured on an H200 (bfloat16, hidden sizes 1024 to 5376, 1 to 16 tokens);
    channels are those of all heads, `front` is a norm in front.

    One token: 512 = 16 or 32 bytes for each of a row's threads, so that x lies on the threads as
    the weight does and need not be moved between them. Behind a norm a program has more registers:
    blocks of 256 where so many programs would not have a place at once.
    """
    if tokens > 1:
        small = hidden <= SMALL_HIDDEN
        return Block(CORE_ROWS, 128, 1, 4) if small else Block(CORE_ROWS, 256, 1, 3)
    if front and channels > 4 * PLACES:
        return Block(4, 256, 1, 1)
    if hidden <= TINY_HIDDEN or (front and hidden % 512 == 0):
        return Block(4, 512, 1, 1)
    return Block(4 if front or hidden in NARROW else 8, 512, 2, 1)


def widths(operands: Mapping[str, Operand | None]) -> dict[str, tuple[int, int]]:
    """Heads and channels of those of q, k and v that are there."""
    found = {name: operands.get(f"{name}_proj") for name in STREAMS}
    return {name: (int(w.shape[0]), int(w.shape[1])) for name, w in found.items() if w}


def sums_shape(operands: Mapping[str, Operand | None], tokens: Size) -> tuple[Size, int]:
    """The workspace: a row of all heads for each token."""
    return tokens, sum(heads * channels for heads, channels in widths(operands).values())


def plan(
    record: Record,
    operands: Mapping[str, Operand | None],
    eps: tuple[float, float],
    target: str = "",
    block: Block | None = None,
    x_eps: Any = 0.0,
) -> launch.Launch:
    """The launch for operands named as the op's arguments, with q_out, k_out, x_sum (where kept),
    sums and counters.

    Shapes: as the op's, all of them numbers; one row where the record has a front.
    """
    x = _needed(operands, "x")
    batch, tokens, hidden = (int(n) for n in x.shape)
    assert record.front is None or batch * tokens <= NORMED_ROWS, "rows to norm"
    streams = widths(operands)
    _, channels = sums_shape(operands, 1)
    block = block or block_for(batch * tokens, hidden, channels, record.front is not None)
    given = dict(operands) | _streams(operands, batch, tokens)
    tile = Tile(launch.power_above(tokens), 1, block.warps)
    behind = launch.plan(record, given, eps, tokens, target, tile)
    assert "STRIDES" in behind.constants, "every stride is a number"
    arguments, constants = dict(behind.arguments), dict(behind.constants)
    for name in STREAMS:
        del arguments[f"{name}_ptr"]
    del constants["SINGLE"]
    for name in ("x", "sums", "counters"):
        arguments[f"{name}_ptr"] = _needed(operands, name).value
    for name in ("residual", "x_weight", "x_sum"):
        arguments[f"{name}_ptr"] = (operands.get(name) or x).value
    arguments["x_eps"], constants["FRONT"] = x_eps, _front(record)
    for name in STREAMS:
        weight, bias = operands.get(f"{name}_proj"), operands.get(f"{name}_proj_bias")
        arguments[f"{name}_proj_ptr"] = (weight or x).value
        arguments[f"{name}_proj_bias_ptr"] = (bias or x).value
        strides = weight.strides[:2] if weight else (0, 0)
        bias_strides = bias.strides if bias else (0, 0)
        constants[f"{name.upper()}_PROJ"] = (*strides, bias is not None, *bias_strides)
    widest = max(channels for _, channels in streams.values())
    parts = int(launch.ceil_div(widest, block.rows))
    constants |= _sizes(batch, tokens, hidden, widest, block) | {"PARTS": parts}
    grid = (sum(heads for heads, _ in streams.values()) * parts, 1)
    return launch.Launch("project_norm_rope_store", arguments, constants, grid, block.warps)


def _front(record: Record) -> tuple[bool, bool, float, bool]:
    """The kernel's FRONT."""
    if (front := record.front) is None:
        return False, False, 0.0, False
    return True, front.norm.has_weight, front.norm.weight_offset, front.keep_sum


def _sizes(batch: int, tokens: int, hidden: int, channels: int, block: Block) -> dict[str, int]:
    """The kernel's constexprs that x and the launch table decide."""
    rows = batch * tokens
    together = 1 if tokens > 1 else ELEMENTS * block.warps // launch.power_above(channels)
    return {
        "BATCH": batch,
        "BATCH_ROWS": min(launch.power_above(batch), max(1, together)),
        "HIDDEN": hidden,
        "M": rows,
        "ROWS": block.rows,
        "BLOCK_M": 1 if rows == 1 else max(CORE_ROWS, launch.power_above(rows)),
        "BLOCK_K": block.hidden,
        "STAGES": block.stages,
    }


def _streams(
    operands: Mapping[str, Operand | None], batch: int, tokens: int
) -> dict[str, Operand | None]:
    """q, k and v as [B, T, heads, channels] in the workspace, side by side in its rows."""
    sums = _needed(operands, "sums")
    row = int(sums.shape[1])
    return {
        name: Operand(sums.value, (batch, tokens, heads, d), (tokens * row, row, d, 1), 4)
        for name, (heads, d) in widths(operands).items()
    }


def _needed(operands: Mapping[str, Operand | None], name: str) -> Operand:
    operand = operands.get(name)
    assert operand is not None, name
    return operand
