"""What decoding hands on: streams found in a graph, the sites planned from them, and refusals that
say why not.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from fxfuse.patterns.advice import advice_for
from fxfuse.patterns.record import (
    AddNorm,
    Cast,
    DecodeAttention,
    GroupedHeads,
    Record,
    Stream,
)
from fxfuse.patterns.value import Leaf, Size, Value, product
from fxfuse.slots import Call, Scalar, Slot

Step: TypeAlias = tuple[Any, ...]
UNCAST = Cast()


@dataclasses.dataclass(frozen=True)
class Access:
    """How an op's operand is made of a leaf's tensor: methods called in order, each (name,
    *arguments): views, and for a row's statistic that no node of the graph holds its arithmetic.
    """

    leaf: Leaf
    steps: tuple[Step, ...]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The operand of a tensor; casts leave float64 as it is."""
        for name, *args in self.steps:
            if name == "view_as_real":
                x = torch.view_as_real(x)
            elif name != "float" or x.dtype != torch.float64:
                x = getattr(x, name)(*args)
        return x


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """One tensor between projection and attention, as an op's stream: its record, and where its
    operands are.

    positions: the rows of cos and sin that its tokens turn by; None where those are its tables.
    rows: the dim of the decoded value that is the op's batch, token and head axis; None where it
    has none.
    """

    slot: Slot
    value: Value
    stream: Stream
    rows: tuple[int | None, int | None, int | None]
    x: Access
    weight: Access | None = None
    scale: Access | None = None
    cos: Access | None = None
    sin: Access | None = None
    eps: float | Scalar = 0.0
    bias: Access | None = None
    positions: Access | None = None

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The slot's axes that its channels walk: two where they are pairs, not flattened there."""
        return tuple(range(len(self.value.dims) - 1, len(self.slot.shape)))

    def accesses(self) -> list[Access]:
        every = (self.x, self.weight, self.bias, self.scale, self.cos, self.sin, self.positions)
        return [a for a in every if a is not None]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why something that looks like the target was left alone, or left out of a site: what was
    found where in the model's source; what was wanted in its place and what to do are the reason's
    own, see `advice`.
    """

    stage: str
    node: str
    reason: str
    where: str
    wanted: str = ""
    do: str = ""

    def __post_init__(self) -> None:
        advice = advice_for(self.reason)
        object.__setattr__(self, "wanted", self.wanted or advice.wanted)
        object.__setattr__(self, "do", self.do or advice.do)

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason} (node {self.node}, {self.where})"

    def explained(self, indent: str = "") -> str:
        """All of it, in three lines."""
        return f"{self}\n{indent}  wanted: {self.wanted}\n{indent}  to do: {self.do}"


@dataclasses.dataclass(frozen=True, eq=False)
class CacheIndex:
    """An index of a cache's axis: slots // divisor % modulus (0: none), as `reader` read slots;
    `made` are the tensors in between.
    """

    slots: Slot
    divisor: int
    modulus: int
    reader: Call
    made: tuple[Slot, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class StoreWrite:
    """One write of rows into a cache: `cache[.., indices, ..] = value`.

    places    for each axis of the cache the value's axis that fills it, None where the value lacks
              one of size 1; for those of `indexed` the number of their index
    tokens    the value's axes that the indices walk, without those that it lacks
    negative  what an index below 0 means, see `Store`; `skipped` too
    cast      how the value's numbers became the cache's; `through` has the calls that did it, each
              with the tensor it did it to, and `scale` their scale tensor and its reader
    axes      the letters of the cache's axes where an op's contract says them: the value is
              [T, G, D] then
    joint     the call that joined the value with another one, where this is one of two writes that
              the graph does as one; `behind` has the calls of a cast of what was joined
    """

    call: Call
    cache: Slot
    value: Slot
    places: tuple[int | None, ...]
    indexed: frozenset[int]
    tokens: tuple[int, ...]
    indices: tuple[CacheIndex, ...]
    negative: Literal["invalid", "wrap", "skip"]
    cast: Cast = UNCAST
    through: Mapping[Call, Slot] = dataclasses.field(default_factory=dict)
    scale: tuple[Slot, Call] | None = None
    axes: str = ""
    joint: Call | None = None
    behind: frozenset[Call] = frozenset()
    skipped: int | None = None

    @property
    def handed_on(self) -> frozenset[Call]:
        """The calls between rows and cache that are the write's own; they count as views."""
        joint = {self.joint} if self.joint is not None else frozenset()
        return frozenset(self.through) | joint | self.behind

    @property
    def roots(self) -> tuple[Slot, ...]:
        """The tensors that the indices are made of, each once."""
        return tuple(dict.fromkeys(i.slots for i in self.indices))


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """What q, k and v of a site are products of: x [B, T, hidden], and for each of its streams a
    weight [H, D, hidden] and a bias [H, D], or None. With a norm in front x is normed first, after
    the residual was added to it.
    """

    x: Access
    weights: tuple[Access, ...]
    biases: tuple[Access | None, ...]
    residual: Access | None = None
    norm: "NormSite | None" = None

    def accesses(self) -> list[Access]:
        weight = self.norm.normed.weight if self.norm else None
        some = (*self.biases, self.residual, weight)
        return [self.x, *self.weights, *(a for a in some if a is not None)]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One fused op: its record, its streams (q first), its stores, the node it is inserted before,
    and views of its results that the model takes before that node and that move behind the op.
    A k that is stored by an op of its own stands for its q too, of which the op sees no head.
    `slots` are what the stores' indices are made of, as [B|1, T]; `scales` the scale tensors of the
    caches of k and v; `projection` is there where the record says so. `kind` is "key" for the k of
    an attention whose q is a site of its own, "norm" where q and k are normed and not rotated, else
    "attention".
    """

    record: Record
    q: Decoded
    k: Decoded | None
    v: Decoded | None
    k_store: StoreWrite | None
    v_store: StoreWrite | None
    before: fx.Node
    sunk: tuple[fx.Node, ...] = ()
    kind: str = "attention"
    slots: tuple[Access, ...] = ()
    scales: tuple[Access | None, Access | None] = (None, None)
    projection: Projection | None = None

    @property
    def rows(self) -> int | None:
        """Tokens of all batch rows together, None where symbolic."""
        slot = self.q.slot
        return rows_count([slot.shape[r] for r in self.q.rows[:2] if r is not None])

    @property
    def device(self) -> torch.device:
        return self.q.slot.device

    @property
    def target(self) -> str:
        """The device type."""
        return self.device.type

    def is_single(self) -> bool:
        """Whether it makes one tensor alone: a q, or a k that is stored; the latter's q has no
        heads.
        """
        return self.k is None or self.k.slot is self.q.slot

    def streams(self) -> list[Decoded]:
        return [s for s in (self.q, self.k, self.v) if s is not None]

    def stores(self) -> list[StoreWrite]:
        return [s for s in (self.k_store, self.v_store) if s is not None]


@dataclasses.dataclass(frozen=True, eq=False)
class NormSite:
    """One fused norm over the hidden width, with the sum in front of it where the op makes that:
    its record, the normed stream (read over the sum), the addends, the node it is inserted before,
    and the nodes between sum and result that are of no use to anybody else.
    """

    record: AddNorm
    normed: Decoded
    addends: tuple[Access, ...]
    sum: Slot | None
    before: fx.Node
    own: frozenset[fx.Node] = frozenset()
    kind: str = "add_rms_norm"


@dataclasses.dataclass(frozen=True, eq=False)
class Repeated:
    """What attention's k or v was repeated from: a slot, the views that give it their axes, and how
    often each head was repeated.
    """

    slot: Slot
    steps: tuple[Step, ...]
    times: int


@dataclasses.dataclass(frozen=True, eq=False)
class GroupedSite:
    """One attention call that reads repeated heads, its query, and what its k and v were before;
    where its kind is "decode_attention" the op takes its place, with its mask and scale.
    """

    record: GroupedHeads | DecodeAttention
    call: Call
    query: Slot
    key: Repeated
    value: Repeated
    kind: str = "grouped_heads"
    mask: Slot | None = None
    scale: float | None = None

    @property
    def rows(self) -> int | None:
        """Queries of all batch rows together, None where symbolic."""
        return rows_count([self.query.shape[0], self.query.shape[2]])

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def target(self) -> str:
        """The device type."""
        return self.device.type


@dataclasses.dataclass(frozen=True)
class Left:
    """A site that the gate leaves to the compiler: neither fused nor refused."""

    kind: str
    reason: str
    node: str
    where: str


# Why a site of a kind that makes a slot is left to the compiler, or nothing. The record is None
# before it is known; the number is of rows, None where symbolic.
AnyRecord: TypeAlias = Record | AddNorm | GroupedHeads | DecodeAttention
Gate: TypeAlias = Callable[[str, Slot, "int | None", "AnyRecord | None"], str]


def fuse_all(kind: str, slot: Slot, rows: int | None, record: AnyRecord | None) -> str:
    """The gate that leaves nothing."""
    return ""


def rows_count(sizes: Iterable[Size]) -> int | None:
    """A product of sizes, None where one is symbolic."""
    found = product(sizes)
    return found if isinstance(found, int) else None


def location(node: fx.Node) -> str:
    """The model's file:line of a node: the innermost frame of its stack trace.

    A file of an installed package is named from the package on.
    """
    frames = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File ")
    ]
    if not frames:
        return "no source"
    file, line, *_ = frames[-1].removeprefix("File ").split(", ")
    path = file.strip('"').rpartition("site-packages/")[2]
    return f"{path}:{line.removeprefix('line ')}"
