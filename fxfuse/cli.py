"""The command line: `fxfuse` and `python -m fxfuse`."""

import argparse
import sys
from collections.abc import Sequence

from fxfuse.bench import command as bench
from fxfuse.bench import tune
from fxfuse.settings import FxfuseError
from fxfuse.sweep import command as sweep
from fxfuse.tools import doctor, draw, explain

# Each enters its subcommand, with its `run`, into a parser.
COMMANDS = (explain, draw, doctor, sweep, bench, tune)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status, 2 where it was asked for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="fxfuse", description="fxfuse: attention preludes fused inside torch.compile"
    )
    subcommands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_arguments(subcommands)
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    # What stands behind -- is a script's own.
    args.arguments = words[cut + 1 :]
    if args.arguments and args.command != "explain":
        parser.error(f"{args.command} takes no arguments behind --")
    try:
        status: int = args.run(args)
    except FxfuseError as error:
        print(f"fxfuse {args.command}: {error}", file=sys.stderr)
        return 2
    return status
