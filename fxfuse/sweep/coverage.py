"""docs/coverage.md: what of each unit is fused, and why not what is not.

In: Results. Out: Markdown. A generative unit is shown by its decode step, others by their one run;
of several dtypes the first counts, as the sites are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from fxfuse.sweep.no_rotation import NO_ROTATION
from fxfuse.sweep.results import Results, Run, UnitResult
from fxfuse.sweep.summary import totals

# The scenario that shows a unit best comes first.
SHOWN = ("static_decode", "dynamic_decode", "no_cache", "static_prefill")
HEAD = """\
# Coverage

Every rotary model of transformers and diffusers, tiny and with random weights, eager against
compiled. Written by `fxfuse sweep`; `--models` runs any part of it.

A *layer* is a call of an attention module in which a rotation function runs, counted in the eager
run without fxfuse; *q, k* are the tensors those functions return. *fused* counts sites that ran, of
them *stored* those that write the KV cache themselves. *left* are multiplications by cosines or
sines between projection and attention that are still in the compiled graphs.
"""


def document(results: Results) -> str:
    """The whole page."""
    rotary = [u for u in results.units.values() if u.rotates]
    whole = [u for u in rotary if _shown(u).covered and not _shown(u).residue]
    parts = [u for u in rotary if u not in whole]
    sections = [
        HEAD,
        _made(results),
        "## Totals\n",
        _table(["scenario", "dtype", *TOTALS], _total_rows(results)),
        f"## Fused whole: {len(whole)} units\n",
        _table(["unit", "layers", "stages", "stored"], map(_whole_row, whole)),
        f"## Fused in part, or not: {len(parts)} units\n",
        _table(["unit", "layers", "fused", "q, k", "of", "left", "why"], map(_part_row, parts)),
        "## Stores that stay the model's\n",
        _table(["reason", "units"], _store_rows(rotary)),
        "## Not as eager\n",
        _table(["unit", "scenario", "dtype", "what"], _other_rows(results)),
        "## Units without a rotation\n",
        _table(["unit", "why"], _without_rotation(results)),
        "## What did not run\n",
        _table(["unit", "scenario", "why"], _not_run(results)),
    ]
    return "\n".join(sections)


TOTALS = ("units", "layers", "fused", "q, k", "fused", "stores", "stored", "left in", "wrong")


def _made(results: Results) -> str:
    made = results.made
    versions = [f"{n} {made[n]}" for n in ("torch", "transformers", "diffusers") if n in made]
    return f"{', '.join(versions)}; {made['device']}, compiler={made['compiler']!r}.\n"


def _total_rows(results: Results) -> Iterable[Sequence[object]]:
    for (scenario, dtype), total in totals(results).items():
        counts = (total.units, total.calls, total.fused, total.tensors, total.fused_tensors)
        rest = (total.storing, total.stored, total.residue, total.wrong)
        yield (scenario, dtype, *counts, *rest)


def _shown(unit: UnitResult) -> Run:
    """The run that shows a unit that rotates."""
    return min((r for r in unit.runs if r.calls), key=lambda run: SHOWN.index(run.scenario))


def _whole_row(unit: UnitResult) -> Sequence[object]:
    run = _shown(unit)
    storing = run.rotary["storing"]
    stored = f"{run.stored} of {storing}" if storing else ""
    return (unit.unit, run.calls, "; ".join(run.stages), stored)


def _part_row(unit: UnitResult) -> Sequence[object]:
    run = _shown(unit)
    reasons = [r for r in run.reasons if not r.startswith("store")] + run.notes
    reasons += [] if reasons else [run.message or "not seen"]
    tensors = (run.tensors, run.rotary["tensors"])
    return (unit.unit, run.calls, run.fused, *tensors, len(run.residue), "; ".join(reasons))


def _store_rows(units: list[UnitResult]) -> Iterable[Sequence[object]]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for unit in units:
        run = _shown(unit)
        if run.scenario.startswith("static") and run.stored < run.rotary["storing"]:
            for reason in [r for r in run.reasons if r.startswith("store")] or ["none given"]:
                by_reason[reason.removeprefix("store: ")].append(unit.unit)
    return [(reason, ", ".join(names)) for reason, names in sorted(by_reason.items())]


def _other_rows(results: Results) -> Iterable[Sequence[object]]:
    for unit, run in results.runs():
        if run.status not in ("ok", "none"):
            error = "" if run.error is None else f" (relative error {run.error:.1e})"
            what = f"{run.status}: {run.message or run.worst}{error}"
            yield (unit.unit, run.scenario, run.dtype, what)


def _without_rotation(results: Results) -> Iterable[Sequence[object]]:
    for name, unit in results.units.items():
        if not unit.rotates and not unit.not_run and any(r.status == "ok" for r in unit.runs):
            yield (name, NO_ROTATION.get(name, "no rotation runs with its default config"))


def _not_run(results: Results) -> Iterable[Sequence[object]]:
    for name, unit in results.units.items():
        if unit.not_run:
            yield (name, "", unit.not_run)
        yield from ((name, r.scenario, r.message) for r in unit.runs if r.status == "none")


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [_line(row) for row in rows]
    if not lines:
        return "None.\n"
    return "\n".join([_line(columns), "|---" * len(columns) + "|", *lines]) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
