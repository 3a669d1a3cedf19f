"""The command line: `fxfuse` and `python -m fxfuse`."""

import argparse
from collections.abc import Sequence

from fxfuse.bench import command, tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    parser = argparse.ArgumentParser(
        prog="fxfuse", description="fxfuse: attention preludes fused inside torch.compile"
    )
    subcommands = parser.add_subparsers(dest="command", required=True)
    command.add_arguments(subcommands)
    tune.add_arguments(subcommands)
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status
