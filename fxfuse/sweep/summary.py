"""What a sweep comes to: totals, and what makes it fail.

In: Results. Out: totals by scenario and dtype, text, and one line for each failure.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxfuse.sweep.results import Results, Run


@dataclass
class Total:
    """Sums over the units that rotate. What is fused twice makes up for nothing elsewhere."""

    units: int = 0
    whole: int = 0
    calls: int = 0
    fused: int = 0
    tensors: int = 0
    fused_tensors: int = 0
    storing: int = 0
    stored: int = 0
    residue: int = 0
    wrong: int = 0
    crash: int = 0
    stock: int = 0

    def add(self, run: Run) -> None:
        tensors, storing = run.rotary["tensors"], run.rotary["storing"]
        self.units += 1
        self.whole += run.covered and not run.residue
        self.calls += run.calls
        self.fused += min(run.fused, run.calls)
        self.tensors += tensors
        self.fused_tensors += min(run.tensors, tensors)
        self.storing += storing
        self.stored += min(run.stored, storing)
        self.residue += bool(run.residue)
        self.wrong += run.status == "wrong"
        self.crash += run.status == "crash"
        self.stock += run.status == "stock"

    def __str__(self) -> str:
        return (
            f"{self.whole} of {self.units} units whole; layers {self.fused} of {self.calls}, "
            f"q and k {self.fused_tensors} of {self.tensors}, stores {self.stored} of "
            f"{self.storing}; {self.residue} with residue, {self.wrong} wrong, "
            f"{self.crash} crashes, {self.stock} as stock"
        )


def totals(results: Results) -> dict[tuple[str, str], Total]:
    """Totals by (scenario, dtype)."""
    found: dict[tuple[str, str], Total] = {}
    for unit, run in results.runs():
        if unit.rotates and run.calls:
            found.setdefault((run.scenario, run.dtype), Total()).add(run)
    return found


def summary(results: Results) -> str:
    """Totals as text, then the units that did not run."""
    rotating = sum(u.rotates for u in results.units.values())
    absent = {name: u.not_run for name, u in results.units.items() if u.not_run}
    lines = [f"\n{len(results.units)} units: {rotating} rotate, {len(absent)} did not run"]
    lines += [f"{scenario} {dtype}: {t}" for (scenario, dtype), t in totals(results).items()]
    lines += [f"not run: {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def failures(results: Results) -> list[str]:
    """Wrong results and crashes that stock has not; a rotation left where all count as fused."""
    problems = []
    for unit, run in results.runs():
        at = f"{unit.unit} {run.scenario} {run.dtype}"
        if run.status in ("wrong", "crash"):
            problems.append(f"{run.status}: {at}: {run.message or run.worst} {run.error or ''}")
        if run.fused >= run.calls and run.residue and run.status != "none":
            problems.append(f"residue: {at}: {'; '.join(run.residue[:3])}")
        if run.fused and not unit.rotates:
            problems.append(f"fused where nothing rotates: {at}")
    return problems
