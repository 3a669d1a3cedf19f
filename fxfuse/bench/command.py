"""The subcommand `fxfuse bench`: its arguments, and the loop over rows."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from fxfuse.bench import (
    arguments,
    measure,
    opponents,
    plot,
    recipes,
    rows,
    show,
    timing,
    whole_command,
)
from fxfuse.progress import progress

EPILOG = """examples:
  fxfuse bench prelude --json prelude.json --plot prelude.png
  fxfuse bench rope_store --tokens 1 4096 --opponents inductor fxfuse
  for i in 0 1 2 3; do fxfuse bench packed --compile-only --shard $i/4 & done; wait"""


def add_arguments(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Enter `bench` and its recipes into a parser."""
    bench = subcommands.add_parser(
        "bench",
        help="time fxfuse beside Inductor and other libraries",
        description="Check and time a recipe; every opponent runs the very same chain.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = bench.add_subparsers(dest="recipe", required=True, metavar="recipe")
    for name, recipe in recipes.RECIPES.items():
        words = " ".join((next(iter(recipe.chains.values())).__doc__ or "").split())
        one = names.add_parser(name, help=words, description=words)
        layouts = list(recipe.chains)
        one.add_argument("--layout", choices=layouts, default=layouts[0])
        one.add_argument("--tokens", type=arguments.positive, nargs="+", metavar="T")
        one.add_argument("--only", default="", metavar="NAME", help="a part of a shape's name")
        one.add_argument("--opponents", nargs="+", choices=list(opponents.OPPONENTS))
        arguments.add_shared(one, rounds=20)
        one.add_argument("--plot", type=Path, metavar="FILE")
        one.set_defaults(run=run)
    whole_command.add_arguments(names)


def run(args: argparse.Namespace) -> int:
    """Run one recipe; 1 where some opponent was wrong or failed."""
    device = arguments.device_of(args.device)
    if args.plot:
        arguments.need("matplotlib", "--plot")
    chosen = opponents.choose(args.opponents, args.recipe, device)
    i, n = args.shard
    cases = recipes.cases(args.recipe, device, args.tokens, args.only, args.layout)
    if args.compile_only:
        _compile([(c, o) for c in cases for o in chosen][i::n], device)
        return 0
    found = rows.started(
        device, timing.copy_bytes_per_us(device), timing.smallest_kernel_us(device)
    )
    print(show.head(found), flush=True)
    with progress(len(cases[i::n])) as begin:
        for case in cases[i::n]:
            begin(f"{case.shape.name} T={case.tokens}")
            start = time.perf_counter()
            row = measure.measure(case, device, chosen, args.rounds, found.copy_bytes_per_us)
            found.rows.append(row)
            cells = show.line(row, found.copy_bytes_per_us)
            told = "  ".join(f"{name}={cell}" for name, cell in cells.items() if cell)
            print(f"{told}  ({time.perf_counter() - start:.1f} s)", flush=True)
            # After every row: what a time limit cuts off is not lost.
            if args.json:
                found.write(args.json)
    show.results(found)
    if args.plot:
        plot.write(found, args.plot)
    return int(any(figure.wrong for row in found.rows for figure in row.figures.values()))


def _compile(pairs: Sequence[tuple[recipes.Case, opponents.Opponent]], device: str) -> None:
    with progress(len(pairs)) as begin:
        for case, opponent in pairs:
            name = f"{case.shape.name} T={case.tokens} {opponent.name}"
            begin(name)
            print(f"{name}: {measure.compile_only(case, device, opponent):.1f} s", flush=True)
