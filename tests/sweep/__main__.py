"""Every rotary model of transformers and diffusers, eager against compiled.

    python -m tests.sweep --library all --jobs 2 --out sweep.json
    python -m tests.sweep --only qwen3,=qwen3_vl.text --all-scenarios

A unit that is in the JSON already is skipped. `--only arch` takes every unit of a folder, `=unit`
the one of that name. The exit code is 1 for a wrong result or a crash that stock torch.compile has
not, for a rotation left in a graph that counts as covered, and for a lost site.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from fxfuse.compiling import source_tag
from fxfuse.tiny.units import architectures, transformers_units, units_of
from tests.sweep import coverage, expected
from tests.sweep.measure import Plan
from tests.sweep.results import Results, UnitResult, line_of, load, save
from tests.sweep.run import run_units
from tests.sweep.sample import SAMPLE
from tests.sweep.scenarios import NAMES, USUAL
from tests.sweep.summary import failures, summary


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    names = list(SAMPLE) if options.sample else _chosen(options.library, options.only)
    if options.list:
        print("\n".join(names))
        return 0
    scenarios = NAMES if options.all_scenarios else tuple(options.scenario)
    plan = Plan(scenarios, tuple(options.dtype), options.device, options.compiler)
    results = load(options.out) if options.out and not options.redo else Results()
    results.made = _made(plan)
    older = [u for u in results.units.values() if u.sources != source_tag()]
    if older:
        print(
            f"{len(older)} units in {options.out} are of other sources of fxfuse; --redo runs them"
        )
    _run_missing(names, plan, results, options)
    chosen = Results(results.made, {n: results.units[n] for n in names})
    print(summary(chosen))
    if options.accept:
        expected.accept(chosen)
    if options.document:
        options.document.write_text(coverage.document(chosen))
    problems = [*failures(chosen), *expected.lost_sites(chosen)]
    print("\n".join(problems))
    return 1 if problems else 0


def _run_missing(names: list[str], plan: Plan, results: Results, options: Any) -> None:
    todo = [name for name in names if name not in results.units]
    start = time.monotonic()
    for index, result in enumerate(run_units(todo, plan, options.jobs, options.timeout), 1):
        results.units[result.unit] = result
        at = f"[{index}/{len(todo)} {time.monotonic() - start:.0f} s]"
        print("\n".join(f"{at} {line}" for line in _lines(result)), flush=True)
        if options.out:
            save(results, options.out)


def _lines(result: UnitResult) -> list[str]:
    lines = [line_of(result, run) for run in result.runs]
    return [*lines, f"{result.unit:36s} {result.not_run}"] if result.not_run else lines


def _chosen(library: str, only: list[str] | None) -> list[str]:
    """Names of units; without `only` all of a library, but for those made of others."""
    if only is None:
        names: list[str] = []
        if library != "diffusers":
            names += [u.name for u in transformers_units().values() if not u.whole]
        return names + (_diffusers() if library != "transformers" else [])
    known = set(architectures())
    names = []
    for wanted in only:
        exact, arch = wanted.removeprefix("="), wanted.removeprefix("=").partition(".")[0]
        if exact.startswith("diffusers"):
            names += [n for n in _diffusers() if exact in (n, "diffusers")]
        elif wanted.startswith("=") or "." in wanted:
            names += [n for n in units_of(arch) if n == exact]
        elif arch in known:
            names += [u.name for u in units_of(arch).values() if not u.whole]
    return names


def _diffusers() -> list[str]:
    from tests.sweep.diffusion import diffusers_units

    return list(diffusers_units())


def _made(plan: Plan) -> dict[str, Any]:
    """How the results come about, for their readers."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if "diffusers" in sys.modules:
        versions["diffusers"] = sys.modules["diffusers"].__version__
    return {
        **versions,
        "device": plan.device,
        "compiler": plan.compiler,
        "dtypes": list(plan.dtypes),
        "scenarios": list(plan.scenarios),
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="python -m tests.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--library", choices=["transformers", "diffusers", "all"], default="transformers")
    add("--only", type=listed, help="folders, or =units, separated by commas")
    add("--sample", action="store_true", help="the units that make test runs")
    add("--scenario", type=listed, default=list(USUAL), help=", ".join(NAMES))
    add("--all-scenarios", action="store_true")
    add("--dtype", type=listed, default=["float32"], help="float32, bfloat16, float16")
    add("--device", default="cpu")
    add("--compiler", choices=["eager", "aot_eager", "inductor"], default="eager")
    add("--jobs", type=int, default=1, help="units side by side")
    add("--timeout", type=float, default=240.0, help="seconds for a unit")
    add("--out", type=Path, help="JSON, rewritten after every unit; what it holds is skipped")
    add("--redo", action="store_true", help="run also what the JSON holds")
    add("--accept", action="store_true", help=f"write the counts to {expected.FILE.name}")
    add("--document", type=Path, help="write the tables of docs/coverage.md there")
    add("--list", action="store_true", help="only print the names")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
