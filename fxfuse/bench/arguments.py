"""Arguments that all recipes share, and what they must be."""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch


def add_shared(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Enter the arguments that every recipe takes."""
    parser.add_argument("--device", choices=["cuda", "cpu"], help="the GPU if there is one")
    parser.add_argument("--rounds", type=positive, default=rounds, help="samples of each figure")
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N")
    parser.add_argument(
        "--compile-only", action="store_true", help="fill Inductor's caches on disk, no more"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard, wanted I/N with I < N, as 0/4")
    return int(i), int(n)


def device_of(name: str | None) -> str:
    """The device asked for, or the GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        sys.exit("fxfuse bench: --device cuda, but torch sees no GPU")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def need(package: str, what: str) -> None:
    """Exit with what to install where a package is missing."""
    if importlib.util.find_spec(package) is None:
        sys.exit(f"fxfuse bench: {what} needs {package}: pip install {package}")
