"""What one compile fused, what it refused and why, and what it cost; prints as a table, or as
JSON.
"""

import dataclasses
import json
import threading
from collections import Counter
from typing import Any

from fxfuse.patterns.record import Record, Stream
from fxfuse.patterns.site import Refusal, Site, location


@dataclasses.dataclass(frozen=True)
class Fused:
    """One fused site: its stages, the model's file:line, the op it became, who lowers it, and its
    record.
    """

    stages: tuple[str, ...]
    where: str
    op: str
    provider: str
    record: Record
    eps: tuple[Any, Any]
    kind: str = "attention"


@dataclasses.dataclass
class Report:
    """The report of one compile (of several graphs, where the model breaks into several)."""

    fused: list[Fused] = dataclasses.field(default_factory=list)
    refused: list[Refusal] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    graphs: int = 0

    def add(self, other: "Report") -> None:
        """Take in the report of a further graph."""
        self.fused += other.fused
        self.refused += other.refused
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
            (" + ".join(f.stages), _short(f.record.q), f.op, f.provider, f.where)
            for f in self.fused
        )
        for (stages, rotation, op, provider, where), count in rows.items():
            lines.append(f"  {count:3d} × {stages}  [{rotation}]  {op} by {provider}  {where}")
        for refusal, count in Counter(map(str, self.refused)).items():
            lines.append(f"  refused {count} × {refusal}")
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


def _short(stream: Stream) -> str:
    rotation = stream.rotation
    if rotation is None:
        return "no rotation"
    width = "" if 2 * rotation.pairs == stream.channels else f"{2 * rotation.pairs} of "
    adjacent = rotation.x.second == rotation.x.first + 1 and rotation.x.step == 2
    return f"{width}{stream.channels} channels, {'adjacent' if adjacent else 'half'} pairs"


def stages_of(record: Record) -> tuple[str, ...]:
    """The stages of a site in the order they are computed."""
    norm = record.q.norm
    name = []
    if norm is not None:
        over = f"{norm.kind}_norm" if norm.over == "head" else "weight"
        name = [f"{over}(1+w)" if norm.weight_offset else over]
    order = [*name, "rope"] if norm is None or norm.when == "before" else ["rope", *name]
    stored = [n for n, s in (("k", record.k), ("v", record.v)) if s is not None]
    return (*order, *([f"store({','.join(stored)})"] if record.store else []))


def fused_of(site: Site, provider: str) -> Fused:
    op = "norm_rope_store_" if site.record.store else "norm_rope"
    eps = (site.q.eps, site.k.eps if site.k else 0.0)
    where = location(site.q.slot.node)
    op = f"fxfuse::{op}"
    return Fused(stages_of(site.record), where, op, provider, site.record, eps, site.kind)


_lock = threading.Lock()
_counts: Counter[str] = Counter({"attention": 0, "store": 0})
_last: Report | None = None


def publish(report: Report) -> None:
    """Make a compile's report the last one and add its sites to the counts."""
    global _last
    with _lock:
        _last = report
        _counts.update(f.kind for f in report.fused)
        _counts["store"] += sum(f.record.store is not None for f in report.fused)


def last_report() -> Report | None:
    """The report of the last graph compiled in this process by any fxfuse backend; None before the
    first.
    """
    return _last


def counts() -> dict[str, int]:
    """Sites fused since import: "attention" for each attention layer of each compiled graph whose
    rotation was fused, "store" for each of those whose site includes the KV-cache store, "key"
    for each k that was fused apart from its q.
    """
    with _lock:
        return dict(_counts)
