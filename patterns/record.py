"""The record of a fused site: everything that shapes its result, and nothing of the graph it came
from.

A record is plain frozen data. It prints as the report shows it, `to_text` is the string an fxfuse
op carries in the graph, and `from_text` reads it back. Two sites with equal records share one proof
and one compiled kernel.
"""

import dataclasses
import functools
import json
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Pair:
    """Where the two members of pair k stand: first + step * k and second + step * k."""

    first: int
    second: int
    step: int


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A rotation of `pairs` channel pairs; for each k in range(pairs), with every index taken from
    its Pair:

    y[y.first]  = x[x.first]  * cos[cos.first]  + signs[0] * x[x.second] * sin[sin.first]
    y[y.second] = x[x.second] * cos[cos.second] + signs[1] * x[x.first]  * sin[sin.second]

    by_head: the tables are [B, T, H, R], each head turns by its own.
    axes:    where a token has a position on each of several axes (mRoPE), by which of them pair k
             turns, for each k; () where it has one position, or the tables are its own.
    """

    pairs: int
    x: Pair
    y: Pair
    cos: Pair
    sin: Pair
    signs: tuple[int, int]
    by_head: bool = False
    axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pass:
    """Channels that go through unrotated: y[y_start + i] = x[x_start + i] for i in
    range(length).
    """

    x_start: int
    y_start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Norm:
    """Norm of a head: x * factor(mean(x * x), eps) * (weight + weight_offset) + bias, in float32.

    over           "head": the statistic is taken over the head's channels inside the op; "given":
                   the graph computed it (a norm over the whole hidden width) and hands it over as
                   the stream's row scale.
    when           "before" or "after" the rotation; decides also which channels the weight meets.
    has_weight     False for a norm without weight; the weight is [D], or [H, D] when it differs by
                   head.
    weight_offset  1.0 for Gemma's (1 + weight), added in float32.
    kind           which statistic, a key of patterns.norms.NORM_KINDS, which has the factor; a
                   kind that is centred takes mean(x) off x first.
    has_bias       whether a bias is added behind the weight, [D] or [H, D] as the weight.
    """

    over: Literal["head", "given"]
    when: Literal["before", "after"]
    has_weight: bool
    weight_offset: float = 0.0
    kind: str = "rms"
    has_bias: bool = False


@dataclasses.dataclass(frozen=True)
class Stream:
    """What happens to one of q, k, v between its projection and attention.

    channels     D, of the input row and of the output row
    has_scale    a row scale tensor multiplies the result; with Norm.over == "given" it is the
                 statistic
    scale        a constant factor of the result
    dtype        of the result, a torch dtype's name
    heads_first  memory order of the result: [B, H, T, D] dense if true, else [B, T, H, D] dense
    keep         the result is returned; False when only the cache receives it
    """

    channels: int
    norm: Norm | None
    rotation: Rotation | None
    passes: tuple[Pass, ...]
    has_scale: bool = False
    scale: float = 1.0
    dtype: str = "float32"
    heads_first: bool = False
    keep: bool = True


@dataclasses.dataclass(frozen=True)
class Cast:
    """How a stored row becomes a cache's numbers: first / or * by a scale tensor, then clamped to
    +-limit (0: not), then rounded once to dtype; a dtype of "" is the cache's own.

    scale   what is done with the cache's scale tensor, "" without one
    factor  a number that multiplies too
    """

    dtype: str = ""
    scale: Literal["", "divide", "multiply"] = ""
    factor: float = 1.0
    limit: float = 0.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a cache holds channel d of head g of batch row b: its axes, a letter each.

    axes  "b" batch, "h" heads, "d" channels, digits the slot's indices; with an axis "e" channels
          are split, d // size of e and d % size of e. transformers' static cache is "bh0d", a flat
          one "0hd", pages "01hd" or "0h1d", the split keys of paged attention "0hd1e".
    index for each digit: operand (0 the slots, 1 the offsets), divisor and modulus (0: none):
          index = operand // divisor % modulus
    """

    axes: str
    index: tuple[tuple[int, int, int], ...] = ((0, 1, 0),)
    cast: Cast = Cast()


@dataclasses.dataclass(frozen=True)
class Store:
    """Rows of k (and v) written into caches, at the same slots.

    negative  what slot -1 means: "invalid" (index_copy_: never given), "wrap" (index_put_: an index
              below 0 counts from its axis' end) or "skip" (the row is not written)
    skipped   a slot whose row is not written either, whatever its sign; None where there is none
    """

    k: Layout
    v: Layout
    negative: Literal["invalid", "wrap", "skip"] = "invalid"
    skipped: int | None = None


@dataclasses.dataclass(frozen=True)
class AddNorm:
    """One fused sum and norm of rows: sum = x (+ residual (+ second)), y = norm(sum).

    channels  D, of a row
    norm      of the whole row; its statistic reads the sum as the graph rounded it
    addends   how many tensors are added, 1 to 3, from the left
    keep_sum  the sum is returned too
    dtype     of y, a torch dtype's name; sums have the dtype torch's addition gives them
    """

    channels: int
    norm: Norm
    addends: int = 1
    keep_sum: bool = False
    dtype: str = "float32"

    def to_text(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), sort_keys=True)

    @staticmethod
    @functools.cache
    def from_text(text: str) -> "AddNorm":
        return _add_norm(json.loads(text))


@dataclasses.dataclass(frozen=True)
class Record:
    """One fused site: streams q, k and v (v only where it is stored), and where k and v are
    stored; projected where the op makes them of one x and their weights itself, and `front` where
    it makes that x too: the norm of a sum of two tensors.
    """

    q: Stream
    k: Stream | None = None
    v: Stream | None = None
    store: Store | None = None
    projected: bool = False
    front: AddNorm | None = None

    def to_text(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), sort_keys=True)

    @staticmethod
    @functools.cache
    def from_text(text: str) -> "Record":
        data = json.loads(text)
        return Record(
            q=_stream(data["q"]),
            k=_stream(data["k"]) if data["k"] else None,
            v=_stream(data["v"]) if data["v"] else None,
            store=_store(data["store"]) if data["store"] else None,
            # A graph that was cached before a field was there has none.
            projected=data.get("projected", False),
            front=_add_norm(data["front"]) if data.get("front") else None,
        )


@dataclasses.dataclass(frozen=True)
class GroupedHeads:
    """One attention whose query heads, n in a row, read one head of k and v.

    heads, kv_heads  of q; of k and v
    channels         of a row of q
    has_mask         attention adds or applies a mask tensor
    dtype            of q, a torch dtype's name
    """

    heads: int
    kv_heads: int
    channels: int
    has_mask: bool
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class DecodeAttention:
    """One attention with one query row: out = softmax(q kᵀ · scale + mask) v.

    heads, kv_heads       of q; of k and v, each read by heads / kv_heads of q in a row
    channels, v_channels  of a row of q and k; of v
    slots                 rows of k and v
    mask                  "" none, "bool" (True is attended), or the dtype of one that is added
    dtype                 of q, k, v and the result; torch dtypes' names
    """

    heads: int
    kv_heads: int
    channels: int
    v_channels: int
    slots: int
    mask: str = ""
    dtype: str = "float32"

    def to_text(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), sort_keys=True)

    @staticmethod
    @functools.cache
    def from_text(text: str) -> "DecodeAttention":
        return DecodeAttention(**json.loads(text))


def _add_norm(data: dict[str, Any]) -> AddNorm:
    return AddNorm(**{**data, "norm": Norm(**data["norm"])})


def _store(data: dict[str, Any]) -> Store:
    def layout(data: dict[str, Any]) -> Layout:
        index = tuple((operand, by, of) for operand, by, of in data["index"])
        return Layout(data["axes"], index, Cast(**data["cast"]))

    return Store(layout(data["k"]), layout(data["v"]), data["negative"], data.get("skipped"))


def _stream(data: dict[str, Any]) -> Stream:
    norm, rotation, passes = data.pop("norm"), data.pop("rotation"), data.pop("passes")
    return Stream(
        norm=Norm(**norm) if norm else None,
        rotation=_rotation(rotation) if rotation else None,
        passes=tuple(Pass(**p) for p in passes),
        **data,
    )


def _rotation(data: dict[str, Any]) -> Rotation:
    x, y, cos, sin = (Pair(**data[name]) for name in ("x", "y", "cos", "sin"))
    signs, axes = tuple(data["signs"]), tuple(data["axes"])
    return Rotation(data["pairs"], x, y, cos, sin, signs, data["by_head"], axes)
