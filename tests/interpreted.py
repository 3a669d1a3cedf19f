"""A test file run as a program in Triton's interpreter, which is chosen when triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def interpreted(file: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The run of a file; its output says "done" where it came to its end."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, file, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def launching() -> list[str]:
    """From now on ops that are called in eager code launch their kernel on the CPU, in such a run;
    the list gets their names.
    """
    from fxfuse import ops
    from fxfuse.lowering import eager, providers

    launches = []

    def launched(name: str, x: Any, args: Any, record: Any) -> Any:
        launches.append(name)
        return eager._norm_rope(record, dict(zip(providers.arguments(name), args, strict=True)))

    ops.launched = launched
    return launches
