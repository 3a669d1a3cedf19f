"""The counts that must not fall: tests/models/expected.txt, one row for a unit and scenario.

In: Results. Out: rows of text; the sites that a sweep lost against the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.sweep.results import Results, Run

FILE = Path(__file__).parents[1] / "models" / "expected.txt"
HEADER = """\
# What `python -m tests.sweep --sample --accept` found: float32, compiler="eager", on the CPU.
# layers: calls of an attention that rotates, and how many of them store into a cache
# fused: sites that ran, and how many of them store; every refusal with its reason
"""
COLUMNS = f"{'unit':30s} {'scenario':14s} layers fused  refused"


@dataclass(frozen=True)
class Row:
    """Counts of one unit in one scenario."""

    unit: str
    scenario: str
    layers: int
    storing: int
    fused: int
    stored: int
    refused: tuple[str, ...]

    def __str__(self) -> str:
        layers, fused = f"{self.layers}/{self.storing}", f"{self.fused}/{self.stored}"
        refused = " | ".join(self.refused) or "-"
        return f"{self.unit:30s} {self.scenario:14s} {layers:6s} {fused:6s} {refused}"


def row_of(unit: str, run: Run) -> Row:
    storing = run.rotary.get("storing", 0)
    reasons = tuple(reason.replace(" | ", " ") for reason in run.reasons)
    return Row(unit, run.scenario, run.calls, storing, run.fused, run.stored, reasons)


def rows_of(results: Results) -> dict[tuple[str, str], Row]:
    """Rows of the float32 runs, by unit and scenario."""
    rows = [row_of(u.unit, run) for u, run in results.runs() if run.dtype == "float32"]
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
    """One line for each scenario with fewer sites or stores than the file has."""
    found = rows_of(results)
    return [
        f"lost: {row.unit} {row.scenario}: {now.fused}/{now.stored} fused, "
        f"{row.fused}/{row.stored} expected"
        for key, row in read(file).items()
        if (now := found.get(key)) and (now.fused < row.fused or now.stored < row.stored)
    ]


def _row(line: str) -> Row:
    unit, scenario, layers, fused, *rest = line.split(maxsplit=4)
    refused = rest[0].split(" | ") if rest and rest[0] != "-" else []
    counts = [int(n) for pair in (layers, fused) for n in pair.split("/")]
    return Row(unit, scenario, *counts, tuple(refused))
