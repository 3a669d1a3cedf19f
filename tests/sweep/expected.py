"""The counts that must not fall: tests/models/expected.txt, one row for a unit and scenario.

In: Results. Out: rows of text; the sites that a sweep lost against the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fxfuse.sweep.results import Results, Run

FILE = Path(__file__).parents[1] / "models" / "expected.txt"
HEADER = """\
# What `python -m tests.sweep --accept` found: float32, compiler="eager", on the CPU.
# layers: calls of an attention that rotates, and how many of them store into a cache
# fused: sites that ran, and how many of them store
# q,k: tensors that fused sites rotate, of all that are rotated
# left: products with cosines or sines that are still in the compiled graphs
"""
COLUMNS = f"{'unit':26s} {'scenario':14s} layers fused q,k   left refused"


@dataclass(frozen=True)
class Row:
    """Counts of one unit in one scenario."""

    unit: str
    scenario: str
    layers: int
    storing: int
    fused: int
    stored: int
    tensors: int
    rotated: int
    left: int
    refused: tuple[str, ...]

    def __str__(self) -> str:
        layers, fused = f"{self.layers}/{self.storing}", f"{self.fused}/{self.stored}"
        tensors, refused = f"{self.tensors}/{self.rotated}", " | ".join(self.refused) or "-"
        counts = f"{layers:6s} {fused:5s} {tensors:5s} {self.left:<4d}"
        return f"{self.unit:26s} {self.scenario:14s} {counts} {refused}"


def row_of(unit: str, run: Run) -> Row:
    storing, rotated = run.rotary.get("storing", 0), run.rotary.get("tensors", 0)
    layers, fused = (run.calls, storing), (run.fused, run.stored)
    tensors, left = (run.tensors, rotated), len(run.residue)
    reasons = tuple(reason.replace(" | ", " ") for reason in run.reasons)
    return Row(unit, run.scenario, *layers, *fused, *tensors, left, reasons)


def rows_of(results: Results) -> dict[tuple[str, str], Row]:
    """Rows of the float32 runs that are as eager, by unit and scenario."""
    rows = [
        row_of(unit.unit, run)
        for unit, run in results.runs()
        if run.dtype == "float32" and run.status == "ok"
    ]
    return {(row.unit, row.scenario): row for row in rows}


def read(file: Path = FILE) -> dict[tuple[str, str], Row]:
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [_row(line) for line in lines if line and not line.startswith(("#", "unit "))]
    return {(row.unit, row.scenario): row for row in rows}


def accept(results: Results, file: Path = FILE) -> None:
    """Write the counts of these units; rows of other units stay."""
    ran = {name for name, unit in results.units.items() if unit.runs}
    rows = {key: row for key, row in read(file).items() if row.unit not in ran}
    rows |= rows_of(results)
    lines = [str(row) for _, row in sorted(rows.items())]
    file.write_text(HEADER + "\n".join(["", COLUMNS, *lines]) + "\n")


def lost_sites(results: Results, file: Path = FILE) -> list[str]:
    """One line for each scenario with fewer sites, stores or rotated tensors than the file has."""
    found = rows_of(results)
    return [
        f"lost: {was.unit} {was.scenario}: {_counts(now)}, expected {_counts(was)}"
        for key, was in read(file).items()
        if (now := found.get(key))
        and any(a < b for a, b in zip(_counts(now), _counts(was), strict=True))
    ]


def _counts(row: Row) -> tuple[int, int, int]:
    """What must not fall: sites, stores, rotated tensors."""
    return row.fused, row.stored, row.tensors


def _row(line: str) -> Row:
    unit, scenario, layers, fused, tensors, left, refused = line.split(maxsplit=6)
    counts = [int(n) for pair in (layers, fused, tensors, left) for n in pair.split("/")]
    return Row(unit, scenario, *counts, tuple(refused.split(" | ")) if refused != "-" else ())
