"""What a sweep comes to: totals, and what makes it fail.

In: Results. Out: text, and one line for each failure.
"""

from __future__ import annotations

from collections import Counter

from tests.sweep.results import Results, Run


def summary(results: Results) -> str:
    """Totals by scenario and dtype, then the units that did not run."""
    rotating = [u for u in results.units.values() if u.rotates]
    absent = {name: u.not_run for name, u in results.units.items() if u.not_run}
    lines = [
        "",
        f"{len(results.units)} units: {len(rotating)} rotate, {len(absent)} did not run",
    ]
    kinds = dict.fromkeys((run.scenario, run.dtype) for _, run in results.runs())
    for scenario, dtype in kinds:
        runs = [r for u in rotating for r in u.runs if (r.scenario, r.dtype) == (scenario, dtype)]
        lines.append(f"{scenario:14s} {dtype:8s} {_totals(runs)}")
    lines += [f"not run: {name}: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def _totals(runs: list[Run]) -> str:
    """Counts of fused sites are capped by the calls there are: none makes up for another."""
    fused, calls = sum(min(r.fused, r.calls) for r in runs), sum(r.calls for r in runs)
    storing = [r for r in runs if r.rotary.get("storing")]
    stored = sum(r.stored >= r.rotary["storing"] for r in storing)
    states = Counter(r.status for r in runs)
    return (
        f"fused {fused} of {calls} attention calls, {sum(r.covered for r in runs)} of {len(runs)} "
        f"units whole; stored whole in {stored} of {len(storing)}; residue in "
        f"{sum(bool(r.residue) for r in runs)}; "
        + ", ".join(f"{n} {status}" for status, n in states.items())
    )


def failures(results: Results) -> list[str]:
    """Wrong results and crashes that stock has not; a rotation left where all count as fused."""
    problems = []
    for unit, run in results.runs():
        at = f"{unit.unit} {run.scenario} {run.dtype}"
        if run.status in ("wrong", "crash"):
            problems.append(f"{run.status}: {at}: {run.message or run.worst} {run.error or ''}")
        if run.covered and run.residue:
            problems.append(f"residue: {at}: {'; '.join(run.residue[:3])}")
    return problems
