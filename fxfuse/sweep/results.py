"""What the sweep found, as data: one `UnitResult` for a unit, one `Run` for a scenario and dtype.

In: what measure.py saw. Out: JSON, read back by a later run, which skips what is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fxfuse.sweep.no_rotation import NO_ROTATION


@dataclass
class Run:
    """One scenario in one dtype.

    status    ok; wrong: differs from eager where stock does not; crash: raises; stock: as stock,
              wrong or a crash without fxfuse too; none: eager itself raises
    rotary    layers, calls, tensors, storing and straight of the eager run (rotations.Rotary)
    fused     attention sites that ran, of them `stored` with the KV-cache store; `tensors` rotated
    compiled  the difference of fxfuse.counts(): sites by kind, as compiled
    residue   multiplications by a table that are left in the compiled graphs
    error     the largest relative error, and `worst` the tensor that has it
    """

    scenario: str
    dtype: str
    status: str = "ok"
    message: str = ""
    rotary: dict[str, int] = field(default_factory=dict)
    fused: int = 0
    stored: int = 0
    tensors: int = 0
    compiled: dict[str, int] = field(default_factory=dict)
    stages: dict[str, int] = field(default_factory=dict)
    refusals: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    residue: list[str] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0
    error: float | None = None
    worst: str = ""
    stock_error: float | None = None

    @property
    def calls(self) -> int:
        """Calls of an attention that rotates: what `fused` is counted against."""
        return self.rotary.get("calls", 0)

    @property
    def covered(self) -> bool:
        """Every rotation of the run was fused, by both counts."""
        return self.fused >= self.calls and self.tensors >= self.rotary.get("tensors", 0)

    @property
    def reasons(self) -> list[str]:
        """The refusals of a run in short, each once."""
        return sorted({f"{r['stage']}: {r['reason']}" for r in self.refusals})


@dataclass
class UnitResult:
    """All runs of a unit, or why there are none; `sources` is the digest of fxfuse's files."""

    unit: str
    model: str = ""
    runs: list[Run] = field(default_factory=list)
    not_run: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    sources: str = ""

    @property
    def rotates(self) -> bool:
        """Whether a rotation runs, by the functions called and by what they compute."""
        return any(r.calls for r in self.runs) and self.unit not in NO_ROTATION


@dataclass
class Results:
    """Every unit's result, and how they were made: library versions, device, compiler."""

    made: dict[str, Any] = field(default_factory=dict)
    units: dict[str, UnitResult] = field(default_factory=dict)

    def runs(self) -> Iterable[tuple[UnitResult, Run]]:
        return ((unit, run) for unit in self.units.values() for run in unit.runs)


def load(path: Path) -> Results:
    if not path.exists():
        return Results()
    data = json.loads(path.read_text())
    units = {name: unit_from(unit) for name, unit in data["units"].items()}
    return Results(data["made"], units)


def unit_from(data: dict[str, Any]) -> UnitResult:
    return UnitResult(**{**data, "runs": [Run(**run) for run in data["runs"]]})


def save(results: Results, path: Path) -> None:
    """Replace the file as a whole: a run that is cut off leaves the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(asdict(results), indent=1))
    os.replace(draft, path)


def line_of(unit: UnitResult, run: Run) -> str:
    """One run as a line of text."""
    error = "" if run.error is None else f"  error {run.error:.1e}"
    counts = f"fused {run.fused}/{run.calls}  stored {run.stored}"
    left = f"  residue {len(run.residue)}" if run.residue else ""
    breaks = f"  breaks {run.breaks}" if run.breaks else ""
    said = f"  {run.message[:120]}" if run.message else ""
    return (
        f"{unit.unit:36s} {run.scenario:14s} {run.dtype:8s} {run.status:5s} "
        f"{counts}{error}{left}{breaks}{said}"
    )
