"""The subcommand `fxfuse sweep`: its arguments, the choice of units, and the loop over them."""

import argparse
import difflib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxfuse.bench.arguments import positive
from fxfuse.compiling import source_tag
from fxfuse.settings import FxfuseError
from fxfuse.sweep import coverage
from fxfuse.sweep.results import Results, UnitResult, line_of, load, save
from fxfuse.sweep.scenarios import NAMES, USUAL
from fxfuse.sweep.summary import failures, summary
from fxfuse.tiny.units import architectures, transformers_units, units_of
from fxfuse.tools.models import QUIET, device_of

# Imported where a sweep begins: it imports all of Inductor, for which no other command should wait.
if TYPE_CHECKING:
    from fxfuse.sweep.measure import Plan

LIBRARIES = ("transformers", "diffusers", "all")
DTYPES = ("float32", "bfloat16", "float16")
# Seconds for a unit.
TIMEOUT = 240.0
WORDS = """\
Every rotary model of transformers and diffusers, tiny and with random weights: outputs and caches
of the compiled model against eager's, and sites counted without asking fxfuse. The exit status is 1
for a wrong result or a crash that stock torch.compile has not, and for a rotation that is left in a
graph that counts as covered."""
EPILOG = """examples:
  fxfuse sweep --models qwen3,=qwen3_vl.text --all-scenarios
  fxfuse sweep --library all --jobs 8 --out sweep.json --document coverage.md"""


def add_arguments(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Enter `sweep` into a parser."""
    sweep = subcommands.add_parser(
        "sweep",
        help="every rotary model of transformers and diffusers, eager against compiled",
        description=WORDS,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = sweep.add_argument
    add("--library", choices=LIBRARIES, default="transformers")
    add("--models", type=_listed, help="folders (qwen3, diffusers) or =units, with commas between")
    add("--scenario", type=_one_of(NAMES), default=list(USUAL), help=", ".join(NAMES))
    add("--all-scenarios", action="store_true")
    add("--dtype", type=_one_of(DTYPES), default=["float32"], help=", ".join(DTYPES))
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--compiler", choices=["eager", "aot_eager", "inductor"], default="eager")
    add("--jobs", type=positive, default=1, metavar="N", help="units side by side")
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help="seconds for a unit")
    add("--out", type=Path, metavar="FILE", help="JSON, after every unit; what it holds is skipped")
    add("--redo", action="store_true", help="run also what the JSON holds")
    add("--document", type=Path, metavar="FILE", help="write the results as tables of Markdown")
    add("--list", action="store_true", help="only print the names")
    sweep.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run what is not in the JSON yet; 1 where something is wrong."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    names = _all_of(args.library) if args.models is None else _chosen(args.models)
    if args.list:
        print("\n".join(names))
        return 0
    from fxfuse.sweep.measure import Plan

    scenarios = NAMES if args.all_scenarios else tuple(args.scenario)
    plan = Plan(scenarios, tuple(args.dtype), device_of(args.device), args.compiler)
    results = load(args.out) if args.out and not args.redo else Results()
    results.made = _made(plan)
    older = [u for u in results.units.values() if u.sources != source_tag()]
    if older:
        print(f"{len(older)} units in {args.out} are of other sources of fxfuse; --redo runs them")
    run_missing(names, plan, results, args.jobs, args.timeout, args.out)
    chosen = Results(results.made, {n: results.units[n] for n in names})
    print(summary(chosen))
    if args.document:
        args.document.write_text(coverage.document(chosen))
    problems = failures(chosen)
    print("\n".join(problems))
    return 1 if problems else 0


def run_missing(
    names: Sequence[str],
    plan: "Plan",
    results: Results,
    jobs: int,
    timeout: float = TIMEOUT,
    out: Path | None = None,
) -> None:
    """Add the units that the results lack, with a line for each run; `out` holds them at once."""
    from fxfuse.sweep.run import run_units

    todo = [name for name in names if name not in results.units]
    start = time.monotonic()
    for index, result in enumerate(run_units(todo, plan, jobs, timeout), 1):
        results.units[result.unit] = result
        at = f"[{index}/{len(todo)} {time.monotonic() - start:.0f} s]"
        print("\n".join(f"{at} {line}" for line in _lines(result)), flush=True)
        if out:
            save(results, out)


def _lines(result: UnitResult) -> list[str]:
    lines = [line_of(result, run) for run in result.runs]
    return [*lines, f"{result.unit:36s} {result.not_run}"] if result.not_run else lines


# --- which units -------------------------------------------------------------------------------


def _all_of(library: str) -> list[str]:
    """Names of a library's units, but for those made of others."""
    names: list[str] = []
    if library != "diffusers":
        _need("transformers")
        names += [u.name for u in transformers_units().values() if not u.whole]
    return names + (_diffusers() if library != "transformers" else [])


def _chosen(models: Sequence[str]) -> list[str]:
    """Names of units, each once."""
    names = dict.fromkeys(name for word in models for name in _units_named(word))
    return list(names)


def _units_named(word: str) -> list[str]:
    """The units of a folder, or the one of a name."""
    name = word.removeprefix("=")
    arch = name.partition(".")[0]
    if name.startswith("diffusers"):
        known = _diffusers()
        found = [n for n in known if name in (n, "diffusers")]
    else:
        _need("transformers")
        known = architectures()
        units = units_of(arch) if arch in known else {}
        is_exact = word.startswith("=") or "." in word
        found = [n for n, u in units.items() if (n == name if is_exact else not u.whole)]
    if not found:
        close = difflib.get_close_matches(name, known, 3)
        near = f" (near it: {', '.join(close)})" if close else ""
        raise FxfuseError(f"no rotary model {word!r}{near}; --list prints all of --library")
    return found


def _diffusers() -> list[str]:
    _need("diffusers")
    from fxfuse.tiny.diffusion import diffusers_units

    return list(diffusers_units())


def _need(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise FxfuseError(f"{library} is not installed: pip install {library}")


def _made(plan: "Plan") -> dict[str, Any]:
    """How the results come about, for their readers."""
    libraries = [name for name in ("transformers", "diffusers") if name in sys.modules]
    return {
        "torch": torch.__version__,
        **{name: sys.modules[name].__version__ for name in libraries},
        "device": plan.device,
        "compiler": plan.compiler,
        "dtypes": list(plan.dtypes),
        "scenarios": list(plan.scenarios),
    }


def _listed(text: str) -> list[str]:
    return text.split(",")


def _one_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument's type: words of a few, with commas between."""

    def parsed(text: str) -> list[str]:
        for word in _listed(text):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return _listed(text)

    return parsed
