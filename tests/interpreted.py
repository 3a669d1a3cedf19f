"""A test file run as a program in Triton's interpreter, which is chosen when triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def interpreted(file: str) -> subprocess.CompletedProcess[str]:
    """The run of a file; its output says "done" where it came to its end."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, file], env=environment, capture_output=True, text=True, check=False
    )
