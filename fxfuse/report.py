"""What one compile fused, what it refused and why, and what it cost; prints as a table, or as
JSON.
"""

import contextlib
import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fxfuse.lowering.providers import Choice
from fxfuse.patterns.record import AddNorm, DecodeAttention, GroupedHeads, Norm, Record
from fxfuse.patterns.site import (
    AnyRecord,
    GroupedSite,
    Left,
    NormSite,
    Refusal,
    Site,
    location,
)


@dataclasses.dataclass(frozen=True)
class Fused:
    """One fused site: its stages, the model's file:line, the op it became, who lowers it, its
    record, how many times faster than Inductor's own code the gate expects it to be (None where
    nobody has measured it), and (provider, reason) for each that was asked and declined.
    """

    stages: tuple[str, ...]
    where: str
    op: str
    provider: str
    record: AnyRecord
    eps: tuple[Any, ...]
    kind: str = "attention"
    gain: float | None = None
    declined: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass
class Report:
    """The report of one compile (of several graphs, where the model breaks into several)."""

    fused: list[Fused] = dataclasses.field(default_factory=list)
    refused: list[Refusal] = dataclasses.field(default_factory=list)
    left: list[Left] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    graphs: int = 0

    def add(self, other: "Report") -> None:
        """Take in the report of a further graph."""
        self.fused += other.fused
        self.refused += other.refused
        self.left += other.left
        self.notes += [n for n in other.notes if n not in self.notes]
        self.graphs += other.graphs
        for stage, ms in other.milliseconds.items():
            self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + ms

    def to_json(self, *, timings: bool = True) -> str:
        """The report as JSON; timings=False leaves out what differs from run to run."""
        data = dataclasses.asdict(self)
        if not timings:
            del data["milliseconds"]
        return json.dumps(data, indent=1, default=str)

    def __str__(self) -> str:
        lines = [
            f"fxfuse: {len(self.fused)} fused, {len(self.refused)} refused, {self.graphs} graph(s)"
        ]
        rows = Counter(
            (" + ".join(f.stages), _short(f.record), f.op, f.provider, _expected(f.gain), f.where)
            for f in self.fused
        )
        for (stages, rotation, op, provider, gain, where), count in rows.items():
            lines.append(
                f"  {count:3d} × {stages}  [{rotation}]  {op} by {provider}{gain}  {where}"
            )
        asked = Counter((f.op, *one) for f in self.fused for one in f.declined)
        for (op, provider, reason), count in asked.items():
            if not reason.startswith("not for "):
                lines.append(f"  declined {count} × {op} by {provider}: {reason}")
        for text, count in Counter(r.explained("    ") for r in self.refused).items():
            lines.append(f"  refused {count} × {text}")
        for (kind, reason), count in Counter((x.kind, x.reason) for x in self.left).items():
            lines.append(f"  left {count} × {KINDS.get(kind, kind)}: {reason}")
        lines += [f"  note: {note}" for note in self.notes]
        if self.milliseconds:
            times = ", ".join(f"{k} {v:.0f}" for k, v in self.milliseconds.items())
            lines.append(f"  ms: {times}{self._share()}")
        return "\n".join(lines)

    def _share(self) -> str:
        compile_ms, own = self.milliseconds.get("compile"), self.milliseconds.get("fxfuse")
        return (
            f" ({100 * own / (own + compile_ms):.1f} % of the compile)"
            if compile_ms and own
            else ""
        )


# What the report calls a kind of site.
KINDS = {
    "attention": "norm and rotation of q and k",
    "norm": "norm of q and k",
    "add_rms_norm": "add + rms_norm",
    "grouped_heads": "attention over repeated heads",
    "decode_attention": "attention with one query",
    "projection": "projection of q, k and v",
    "input_norm": "norm in front of a projection",
}


def _short(record: AnyRecord) -> str:
    if isinstance(record, AddNorm):
        return f"{record.channels} channels"
    if isinstance(record, (GroupedHeads, DecodeAttention)):
        return f"{record.heads} heads over {record.kv_heads}, {record.channels} channels"
    stream = record.q
    rotation = stream.rotation
    if rotation is None:
        return "no rotation"
    width = "" if 2 * rotation.pairs == stream.channels else f"{2 * rotation.pairs} of "
    adjacent = rotation.x.second == rotation.x.first + 1 and rotation.x.step == 2
    pairs = f"{width}{stream.channels} channels, {'adjacent' if adjacent else 'half'} pairs"
    return f"{pairs} by {max(rotation.axes) + 1} axes" if rotation.axes else pairs


def stages_of(record: AnyRecord) -> tuple[str, ...]:
    """The stages of a site in the order they are computed."""
    if isinstance(record, GroupedHeads):
        return ("grouped_heads",)
    if isinstance(record, DecodeAttention):
        return ("decode_attention",)
    if isinstance(record, AddNorm):
        return (*["add"] * (record.addends - 1), _norm_name(record.norm))
    norm = record.q.norm
    name = [] if norm is None else [_norm_name(norm)]
    turn = [] if record.q.rotation is None else ["rope"]
    order = [*name, *turn] if norm is None or norm.when == "before" else [*turn, *name]
    stored = [n for n, s in (("k", record.k), ("v", record.v)) if s is not None]
    first = ["projection"] if record.projected else []
    first = [*stages_of(record.front), *first] if record.front else first
    return (*first, *order, *([f"store({','.join(stored)})"] if record.store else []))


def _norm_name(norm: Norm) -> str:
    over = f"{norm.kind}_norm" if norm.over == "head" else "weight"
    return f"{over}(1+w)" if norm.weight_offset else over


def fused_norm(site: NormSite, choice: Choice) -> Fused:
    where, eps = location(site.normed.slot.node), (site.normed.eps,)
    return Fused(
        stages=stages_of(site.record),
        where=where,
        op="fxfuse::add_rms_norm",
        provider=choice.provider,
        record=site.record,
        eps=eps,
        kind=site.kind,
        declined=choice.declined,
    )


def fused_group(site: GroupedSite, choice: Choice, gain: float | None = None) -> Fused:
    """The entry of an attention call that reads heads as they were before they were repeated."""
    decodes = isinstance(site.record, DecodeAttention)
    return Fused(
        stages=stages_of(site.record),
        where=location(site.call.node),
        op="fxfuse::decode_attention" if decodes else "scaled_dot_product_attention(enable_gqa)",
        provider=choice.provider,
        record=site.record,
        eps=(),
        kind=site.kind,
        gain=gain,
        declined=choice.declined,
    )


def _expected(gain: float | None) -> str:
    return "" if gain is None else f", {gain:.1f} × Inductor expected"


def fused_of(site: Site, choice: Choice, gain: float | None = None) -> Fused:
    op = "norm_rope_store_" if site.record.store else "norm_rope"
    op = f"project_{op}" if site.record.projected else op
    eps = (site.q.eps, site.k.eps if site.k else 0.0)
    where = location(site.q.slot.node)
    op = f"fxfuse::{op}"
    stages = stages_of(site.record)
    if site.q.positions is not None:
        stages = tuple("rope(by position)" if stage == "rope" else stage for stage in stages)
    return Fused(
        stages, where, op, choice.provider, site.record, eps, site.kind, gain, choice.declined
    )


_lock = threading.Lock()
_counts: Counter[str] = Counter({"attention": 0, "store": 0, "norm": 0})
_last: Report | None = None
_collecting: list[Report] = []


@contextlib.contextmanager
def collected() -> Iterator[Report]:
    """One report of all that this process compiles inside, in whichever thread."""
    report = Report()
    with _lock:
        _collecting.append(report)
    try:
        yield report
    finally:
        with _lock:
            _collecting[:] = [other for other in _collecting if other is not report]


def publish(report: Report) -> None:
    """Make a compile's report the last one and add its sites to the counts."""
    global _last
    with _lock:
        _last = report
        for whole in _collecting:
            whole.add(report)
        _counts.update(f.kind for f in report.fused)
        records = [f.record for f in report.fused]
        _counts["store"] += sum(isinstance(r, Record) and r.store is not None for r in records)


def last_report() -> Report | None:
    """The report of the last graph compiled in this process by any fxfuse backend; None before the
    first.
    """
    return _last


def counts() -> dict[str, int]:
    """Sites fused since import: "attention" for each attention layer of each compiled graph whose
    rotation was fused, "norm" for each whose norms of q and k were, without a rotation, "store" for
    each of those whose site includes the KV-cache store, "key" for each k that was fused apart from
    its q, "add_rms_norm" for each norm over the hidden width, "grouped_heads" for each attention
    call that reads heads as they were before they were repeated, "decode_attention" for each with
    one query in a kernel of its own.
    """
    with _lock:
        return dict(_counts)
