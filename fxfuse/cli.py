"""The command line: `fxfuse` and `python -m fxfuse`."""

import argparse
from collections.abc import Sequence

from fxfuse.bench import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status."""
    parser = argparse.ArgumentParser(
        prog="fxfuse", description="fxfuse: attention preludes fused inside torch.compile"
    )
    command.add_arguments(parser.add_subparsers(dest="command", required=True))
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status
