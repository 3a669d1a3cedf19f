"""A Python script run as it is, but for torch.compile: what it hands to Inductor goes through
fxfuse.
"""

import contextlib
import functools
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fxfuse import torch_private
from fxfuse.entry import Backend


def run(script: Path, arguments: Sequence[str], backend: Backend) -> int:
    """Run a script as `python script arguments` does; its exit status."""
    with _swapped(backend), _as_main(script, arguments):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as error:
            if error.code is None or isinstance(error.code, int):
                return error.code or 0
            print(error.code, file=sys.stderr)
            return 1
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [i for i, frame in enumerate(frames) if Path(frame.filename) == script]
            shown = frames[own[0] if own else 0 :]
            print("Traceback (most recent call last):", file=sys.stderr)
            print("".join(traceback.format_list(shown)), end="", file=sys.stderr)
            print("".join(traceback.format_exception_only(error)), end="", file=sys.stderr)
            return 1
    return 0


@contextlib.contextmanager
def _swapped(backend: Backend) -> Iterator[None]:
    """torch.compile with `backend` in Inductor's place; any other backend stays."""
    original: Any = torch.compile

    @functools.wraps(original)
    def through_fxfuse(*args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("backend") or torch_private.default_backend()
        if asked == "inductor":
            kwargs["backend"] = backend
        return original(*args, **kwargs)

    torch.compile = through_fxfuse
    try:
        yield
    finally:
        torch.compile = original


@contextlib.contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
