"""`fxfuse explain`: what is fused in a model, or in all that a script compiles, and why the rest
is not.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fxfuse.entry import Fresh
from fxfuse.progress import progress
from fxfuse.report import Report, collected
from fxfuse.settings import FxfuseError
from fxfuse.tools import models, script
from fxfuse.tools.reading import Reading

EPILOG = """examples:
  fxfuse explain Qwen3                                    a tiny Qwen3 with random weights
  fxfuse explain qwen3_vl.text --cache none --tokens 64
  fxfuse explain ~/models/Qwen3-8B --random-weights --layers 2
  fxfuse explain generate.py --json -- --prompt hello     a script, with its arguments

A model is traced, read and run once as eager code. Of a script each torch.compile(...) that would
go to Inductor goes through fxfuse, and to Inductor from there; --compiler eager leaves it out."""

BACKENDS: dict[str, type[Fresh]] = {"inductor": Fresh, "eager": Reading}


def add_arguments(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Enter `explain` into a parser."""
    explain = subcommands.add_parser(
        "explain",
        help="what is fused in a model or a script, and why the rest is not",
        description="Report what fxfuse fuses in a model, or in all that a script compiles.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("model", metavar="MODEL_OR_SCRIPT", help=models.WANTED)
    models.add_arguments(explain)
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    explain.add_argument("--compiler", choices=list(BACKENDS), help="what compiles")
    explain.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one report; 1 where the script failed or compiled nothing."""
    if args.model.endswith(".py"):
        return _run_script(args)
    if args.arguments:
        raise FxfuseError(f"arguments {' '.join(args.arguments)} are for scripts only")
    args.compiler = args.compiler or "eager"
    with progress(2) as begin:
        begin(f"making {args.model}")
        given = models.given(args)
        arguments, call = given.call(args.cache, args.tokens)
        begin("compiling and running it")
        model: Any = torch.compile(given.model, backend=BACKENDS[args.compiler]())
        with collected() as report, torch.no_grad():
            model(**arguments)
    _print(f"{given.name}, {call}", report, args)
    return 0


def _run_script(args: argparse.Namespace) -> int:
    path = Path(args.model).resolve()
    if not path.is_file():
        raise FxfuseError(f"no script {args.model}")
    args.compiler = args.compiler or "inductor"
    backend = BACKENDS[args.compiler]()
    # Alone on stdout, JSON can be read by another program.
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with collected() as report, aside:
        status = script.run(path, args.arguments, backend)
    _print(args.model, report, args)
    if not report.graphs:
        print(
            f"fxfuse explain: {args.model} compiled nothing by Inductor or fxfuse: does it call "
            "torch.compile, and what that returns?",
            file=sys.stderr,
        )
    return status or int(not report.graphs)


def _print(what: str, report: Report, args: argparse.Namespace) -> None:
    if args.compiler == "eager":
        report.milliseconds.pop("compile", None)
    if args.json:
        print(json.dumps({"what": what} | json.loads(report.to_json()), indent=1))
        return
    text = f"{what}\n{report}"
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        Console().print(text, markup=False, soft_wrap=True)
    else:
        print(text)
