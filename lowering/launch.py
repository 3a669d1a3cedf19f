"""From a record and its operands to one launch of the Triton kernel.

Operands carry their strides as numbers or as symbolic expressions, so the same code launches
under Inductor and directly on tensors. What varies from call to call (sizes, eps, strides that are
no numbers) is an argument; what the record says, and strides that are numbers, are constants.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fxfuse.lowering import launch_stores
from fxfuse.lowering.operand import Operand, Size
from fxfuse.lowering.tiles import LASTING_ROWS, Rows, Tile, tile_for
from fxfuse.patterns.axes import runs_of
from fxfuse.patterns.record import Pair, Pass, Record, Stream

MAX_PASSES = 2
# Places in the kernel's SITE.
TOKENS, AHEAD, LASTING = 11, 12, 13


@dataclasses.dataclass(frozen=True)
class Launch:
    """The kernel, its tensor and scalar arguments, constexprs, grid and warps."""

    kernel: str
    arguments: dict[str, Any]
    constants: dict[str, Any]
    grid: tuple[Size, Size]
    warps: int


def plan(
    record: Record,
    operands: Mapping[str, Operand | None],
    eps: tuple[float, float],
    tokens: int,
    target: str = "",
    tile: Tile | None = None,
) -> Launch:
    """The launch for operands named as the op's arguments, with q_out and k_out beside them.

    Shapes: as the op's; heads and channels are plain numbers. tokens is T or a guess of it; tile
    overrules the launch table.
    """
    q, k, v = _needed(operands, "q"), operands.get("k"), operands.get("v")
    heads, kv_heads = int(q.shape[2]), int((k or v or q).shape[2])
    rows = tokens * (heads + sum(kv_heads for x in (k, v) if x))
    tile = tile or tile_for(target, rows, _kind_of(record, operands)).within(tokens)
    programs, of_streams, of_rows = [], [], []
    for name, stream, x in (("q", record.q, q), ("k", record.k, k), ("v", record.v, v)):
        count = int(x.shape[2]) if x else 0
        each = min(tile.heads, power_above(count))
        programs.append(-(-count // each))
        weights = [operands.get(f"{name}_{part}") for part in ("weight", "bias")]
        of_streams.append((*_stream(stream or record.q, programs[-1], count, *weights), each))
        of_rows.append(_row(stream or record.q))
    keeps = bool(record.k and record.k.keep)
    of_caches = launch_stores.caches(record, operands)
    tables = (_table_rows(operands), axis_runs(record))
    lasting = not operands.get("positions") or rows > LASTING_ROWS
    site = (*of_streams, *of_rows, keeps, *of_caches, *tables, tile.tokens, tile.ahead, lasting)
    constants: dict[str, Any] = {"SITE": site, "SINGLE": q.shape[:2] == (1, 1)}
    grid = (ceil_div(q.shape[1], tile.tokens) * sum(programs), q.shape[0])
    arguments = _pointers(operands) | _scalars(record, operands, eps)
    strides = _strides(record, operands)
    if all(isinstance(n, int) for n in strides):
        constants["STRIDES"] = strides
        return Launch("norm_rope_store_static", arguments, constants, grid, tile.warps)
    arguments |= stride_arguments(strides)
    return Launch("norm_rope_store", arguments, constants, grid, tile.warps)


def stride_arguments(strides: Iterable[Size]) -> dict[str, Size]:
    """Strides as arguments by name."""
    names = [f"stride_{prefix}{axis}" for prefix, axes in AXES.items() for axis in axes]
    return dict(zip(names, strides, strict=True))


def kernel_of(name: str) -> Any:
    """The Triton kernel of a launch."""
    from fxfuse.lowering import attention_kernel, kernels, projection_kernel

    homes = (kernels, projection_kernel, attention_kernel)
    return next(getattr(home, name) for home in homes if hasattr(home, name))


def _kind_of(record: Record, operands: Mapping[str, Operand | None]) -> Rows:
    """What the launch table asks of a row."""
    cos = operands.get("cos")
    return Rows(
        channels=record.q.channels,
        run=widest_run(record.q),
        heads=min(int(x.shape[2]) for x in map(operands.get, "qkv") if x),
        wide_tables=cos is not None and cos.itemsize > 2,
        scattered=is_scattered(record),
    )


def is_scattered(record: Record) -> bool:
    """Whether pairs turn by rows of their own, or a cache's innermost axis is none of channels."""
    turn, store = record.q.rotation, record.store
    by_axes = turn is not None and bool(turn.axes)
    return by_axes or (
        store is not None and any(x.axes[-1] not in "de" for x in (store.k, store.v))
    )


def _needed(operands: Mapping[str, Operand | None], name: str) -> Operand:
    operand = operands.get(name)
    assert operand is not None, name
    return operand


def ceil_div(n: Size, by: int) -> Size:
    """ceil(n / by); of a symbolic size as Inductor prints it."""
    if by == 1:
        return n
    if isinstance(n, int):
        return -(-n // by)
    from torch.utils._sympy.functions import FloorDiv

    return FloorDiv(n + by - 1, by)


def _table_rows(operands: Mapping[str, Operand | None]) -> int:
    """How many rows positions choose from, 0 where there are none."""
    cos = operands.get("cos")
    return int(cos.shape[1]) if cos and operands.get("positions") else 0


@functools.cache
def axis_runs(record: Record) -> tuple[int, ...]:
    """The kernel's AXES: see its module."""
    turn = record.q.rotation
    runs = runs_of(turn.axes if turn and turn.axes else (0,))
    return (len(runs), *(n for run in runs for n in dataclasses.astuple(run)))


def power_above(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


POINTERS = (
    "q",
    "k",
    "v",
    "k_cache",
    "v_cache",
    "slots",
    "offsets",
    "positions",
    "k_cache_scale",
    "v_cache_scale",
    "q_weight",
    "k_weight",
    "q_bias",
    "k_bias",
    "q_scale",
    "k_scale",
    "cos",
    "sin",
)

# The strides that the kernel takes, in its order: prefix of the argument's name, and axes.
AXES: dict[str, str] = {
    "q": "bthd",
    "k": "bthd",
    "v": "bthd",
    "qs": "bth",
    "ks": "bth",
    "cos": "btd",
    "sin": "btd",
}
AXES |= {"kc": "bg012de", "vc": "bg012de", "slot": "bt", "off": "bt", "p": "bta"}
AXES |= {"kcs": "bth", "vcs": "bth"}


def _pointers(operands: Mapping[str, Operand | None]) -> dict[str, Any]:
    q, q_out = _needed(operands, "q"), _needed(operands, "q_out")
    # The kernel never touches an absent operand; a pointer has to stand there all the same.
    arguments = {f"{name}_ptr": (operands.get(name) or q).value for name in POINTERS}
    k_out = operands.get("k_out") or q_out
    return arguments | {"q_out_ptr": q_out.value, "k_out_ptr": k_out.value}


def _scalars(
    record: Record, operands: Mapping[str, Operand | None], eps: tuple[float, float]
) -> dict[str, Any]:
    scalars = {"q_eps": eps[0], "k_eps": eps[1], "T": _needed(operands, "q").shape[1]}
    return scalars | launch_stores.sizes(record, operands)


def _strides(record: Record, operands: Mapping[str, Operand | None]) -> tuple[Size, ...]:
    """Strides in the order of AXES; those of an absent operand are 0."""

    def of(name: str, read: Callable[[Operand], tuple[Size, ...]]) -> tuple[Size, ...] | None:
        operand = operands.get(name)
        return read(operand) if operand else None

    def row_strides(o: Operand) -> tuple[Size, ...]:
        # Of one batch row the stride says nothing but how many tokens there are.
        return (*o.steps(1), *o.strides[1:])

    def table_strides(o: Operand) -> tuple[Size, ...]:
        return (*o.steps(2), o.strides[2])

    def position_strides(o: Operand) -> tuple[Size, ...]:
        *axis, b, t = o.steps(len(o.shape))
        return (b, t, *(axis or [0]))

    found = {
        "q": of("q", row_strides),
        "k": of("k", row_strides),
        "v": of("v", row_strides),
        "qs": of("q_scale", lambda o: o.steps(3)),
        "ks": of("k_scale", lambda o: o.steps(3)),
        "cos": of("cos", table_strides),
        "sin": of("sin", table_strides),
        "kc": launch_stores.strides(record, operands, "k"),
        "vc": launch_stores.strides(record, operands, "v"),
        "slot": of("slots", lambda o: (*o.steps(1), o.strides[1])),
        "off": of("offsets", lambda o: (*o.steps(1), o.strides[1])),
        "p": of("positions", position_strides),
        "kcs": of("k_cache_scale", lambda o: o.steps(3)),
        "vcs": of("v_cache_scale", lambda o: o.steps(3)),
    }
    return tuple(n for name, axes in AXES.items() for n in found[name] or (0,) * len(axes))


NOWHERE = Pair(0, 0, 1)

# The norm kinds that the kernel knows, by its numbers.
KINDS = {"rms": 1, "l2": 2, "layer": 3}


def _stream(
    stream: Stream, programs: int, heads: int, weight: Operand | None, bias: Operand | None
) -> tuple[Any, ...]:
    """The kernel's tuple of a stream but for the heads of a program: see its module."""
    norm = stream.norm
    when = {"before": 1, "after": 2}[norm.when] if norm else 0
    kind = KINDS[norm.kind] if norm and norm.over == "head" else 0
    weight_dims = len(weight.shape) if norm and norm.has_weight and weight else 0
    bias_dims = len(bias.shape) if norm and norm.has_bias and bias else 0
    offset = norm.weight_offset if norm else 0.0
    head = (programs, heads, stream.channels, when, kind, weight_dims, offset)
    return (*head, stream.has_scale, float(stream.scale), stream.heads_first, bias_dims)


def widest_run(stream: Stream) -> int:
    """The widest run of channels that the kernel loads as one block."""
    turn, passes = stream.rotation, [p.length for p in stream.passes]
    if turn is None:
        return max(passes)
    adjacent = turn.x.step == 2 and turn.x.second == turn.x.first + 1
    return max(turn.pairs * (2 if adjacent else 1), *passes, 1)


def _row(stream: Stream) -> tuple[Any, ...]:
    turn = stream.rotation
    low, high = (*stream.passes, Pass(0, 0, 0), Pass(0, 0, 0))[:MAX_PASSES]
    x, y = (turn.x, turn.y) if turn else (NOWHERE, NOWHERE)
    pairs, signs = (turn.pairs, turn.signs) if turn else (0, (1, 1))
    blocks = tuple(power_above(n) for n in (pairs, low.length, high.length))
    places = (*dataclasses.astuple(x), *dataclasses.astuple(y), *signs)
    runs = (*dataclasses.astuple(low), *dataclasses.astuple(high))
    tables = (turn.cos, turn.sin) if turn else (NOWHERE, NOWHERE)
    where = (n for table in tables for n in dataclasses.astuple(table))
    return (pairs, *places, *runs, *blocks, *where)
