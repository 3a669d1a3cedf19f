"""From a record and its operands to one launch of the Triton kernel.

Operands carry their strides as numbers or as symbolic expressions, so the same code launches
under Inductor and directly on tensors. What varies from call to call (sizes, strides, eps) is an
argument; what the record says is a constant.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from fxfuse.patterns.record import Norm, Pair, Pass, Record, Stream

# An int, or Inductor's symbolic expression of one.
Size = Any

MAX_PASSES = 2

# Up to how many tokens, elements in a program's tile, warps: few tokens want many threads on each
# row, many tokens want 16-byte loads.
TABLE = ((64, 1024, 4), (None, 1024, 2))


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor, or what Inductor holds for one, with its shape and strides in elements."""

    value: Any
    shape: tuple[Size, ...]
    strides: tuple[Size, ...]

    def steps(self, dims: int) -> tuple[Size, ...]:
        """Strides of the leading dims, 0 where the operand is broadcast."""
        pairs = zip(self.shape[:dims], self.strides[:dims], strict=True)
        return tuple(0 if size == 1 else stride for size, stride in pairs)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Tensor and scalar arguments, constexprs, grid and warps of one kernel launch."""

    arguments: dict[str, Any]
    constants: dict[str, Any]
    grid: tuple[Size, Size]
    warps: int


def plan(
    record: Record,
    operands: Mapping[str, Operand | None],
    eps: tuple[float, float],
    tokens: int,
) -> Launch:
    """The launch for operands named as the op's arguments, with q_out and k_out beside them.

    Shapes: as the op's; heads and channels are plain numbers. tokens is T or a guess of it.
    """
    q, k, v = _needed(operands, "q"), operands.get("k"), operands.get("v")
    heads, kv_heads = int(q.shape[2]), int((k or v or q).shape[2])
    constants = record_constants(record)
    width = constants["PAIR_BLOCK"] * 2 + constants["LOW_BLOCK"] + constants["HIGH_BLOCK"]
    elements, warps = next(
        (elements, warps) for most, elements, warps in TABLE if most is None or tokens <= most
    )
    tile_heads = min(power_above(max(heads, kv_heads)), max(1, elements // power_above(width // 2)))
    blocks = {
        "Q_BLOCKS": -(-heads // tile_heads),
        "K_BLOCKS": -(-kv_heads // tile_heads) if k else 0,
        "V_BLOCKS": -(-kv_heads // tile_heads) if v else 0,
    }
    constants |= blocks | {"H": heads, "G": kv_heads, "HEADS": tile_heads}
    constants |= _weight_constants("Q", record.q, operands.get("q_weight"))
    constants |= _weight_constants("K", record.k, operands.get("k_weight"))
    grid = (q.shape[1] * sum(blocks.values()), q.shape[0])
    return Launch(_arguments(record, operands, eps), constants, grid, warps)


def _needed(operands: Mapping[str, Operand | None], name: str) -> Operand:
    operand = operands.get(name)
    assert operand is not None, name
    return operand


def power_above(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _arguments(
    record: Record, operands: Mapping[str, Operand | None], eps: tuple[float, float]
) -> dict[str, Any]:
    q, q_out = _needed(operands, "q"), _needed(operands, "q_out")
    # The kernel never touches an absent operand; a pointer has to stand there all the same.
    names: tuple[str, ...] = (
        "q",
        "k",
        "v",
        "k_cache",
        "v_cache",
        "slots",
        "q_weight",
        "k_weight",
        "q_scale",
    )
    names += ("k_scale", "cos", "sin")
    found = {name: operands.get(name) for name in names}
    arguments = {f"{name}_ptr": (found[name] or q).value for name in names}
    arguments |= {
        "q_out_ptr": q_out.value,
        "k_out_ptr": (operands.get("k_out") or q_out).value,
    }
    for x in ("q", "k", "v"):
        arguments |= _strides(x, found[x], "bthd", lambda o: o.strides)
    for x, name in (("qs", "q_scale"), ("ks", "k_scale")):
        arguments |= _strides(x, found[name], "bth", lambda o: o.steps(3))
    for name in ("cos", "sin"):
        arguments |= _strides(name, found[name], "btd", lambda o: (*o.steps(2), o.strides[2]))
    order = "bgsd" if record.store is None or record.store.heads_first else "bsgd"
    for x, name in (("kc", "k_cache"), ("vc", "v_cache")):
        arguments |= _strides(x, found[name], order, lambda o: o.strides)
    cache, slots = found["k_cache"] or found["v_cache"], found["slots"]
    arguments |= {
        "stride_slot": slots.strides[0] if slots else 0,
        "q_eps": eps[0],
        "k_eps": eps[1],
        "T": q.shape[1],
        "S": cache.shape[order.index("s")] if cache else 0,
    }
    return arguments


def _strides(
    prefix: str,
    operand: Operand | None,
    axes: str,
    of: Callable[[Operand], tuple[Size, ...]],
) -> dict[str, Size]:
    values = of(operand) if operand else (0,) * len(axes)
    return {f"stride_{prefix}{axis}": v for axis, v in zip(axes, values, strict=True)}


def _weight_constants(prefix: str, stream: Stream | None, weight: Operand | None) -> dict[str, Any]:
    used = bool(stream and stream.norm and stream.norm.has_weight and weight)
    return {f"{prefix}_WEIGHT": len(weight.shape) if used and weight else 0}


@functools.cache
def record_constants(record: Record) -> dict[str, Any]:
    """The kernel's constexprs that the record alone decides."""
    q, k, v = record.q, record.k, record.v
    turn = q.rotation
    nowhere = Pair(0, 0, 1)
    low, high = (*q.passes, Pass(0, 0, 0), Pass(0, 0, 0))[:MAX_PASSES]
    constants: dict[str, Any] = {"PAIRS": turn.pairs if turn else 0}
    for side in ("x", "y", "cos", "sin"):
        pair = getattr(turn, side) if turn else nowhere
        constants |= {f"{side.upper()}_{n.upper()}": i for n, i in dataclasses.asdict(pair).items()}
    constants["SIGN_FIRST"], constants["SIGN_SECOND"] = turn.signs if turn else (1, 1)
    for name, run in (("LOW", low), ("HIGH", high)):
        constants |= {f"{name}_X": run.x_start, f"{name}_Y": run.y_start}
        constants |= {f"{name}_LENGTH": run.length, f"{name}_BLOCK": power_above(run.length)}
    constants |= {"PAIR_BLOCK": power_above(constants["PAIRS"]), "D": q.channels}
    constants |= {"DV": v.channels if v else 1, "V_BLOCK": power_above(v.channels if v else 1)}
    constants |= _stream_constants("Q", q) | _stream_constants("K", k or q)
    constants |= {
        "K_KEEP": bool(k and k.keep),
        "K_STORE": bool(k and record.store),
        "WRAP": bool(record.store and record.store.negative == "wrap"),
    }
    return constants


def _stream_constants(prefix: str, stream: Stream) -> dict[str, Any]:
    norm: Norm | None = stream.norm
    return {
        f"{prefix}_WHEN": {"before": 1, "after": 2}[norm.when] if norm else 0,
        f"{prefix}_STATISTIC": bool(norm and norm.over == "head"),
        f"{prefix}_OFFSET": norm.weight_offset if norm else 0.0,
        f"{prefix}_HAS_SCALE": stream.has_scale,
        f"{prefix}_SCALE": stream.scale,
        f"{prefix}_HEADS_FIRST": stream.heads_first,
    }
