"""What `import fxfuse` costs beyond `import torch`.

    python benchmarks/import_time.py [PROCESSES]

Imports torch, then fxfuse, asks for its backend, and imports what the first compile would, in fresh
processes; prints the median of each in milliseconds: with fxfuse's bytecode cached, as it is after
the first import of an installed package, and without it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 7
TARGET_MS = 50

# Torch's bytecode is where it is installed; fxfuse's in a folder of its own, or nowhere.
TIMES = """
import json, sys, time
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1] or "/none", not sys.argv[1]
import fxfuse
times.append(time.perf_counter())
fxfuse.backend
times.append(time.perf_counter())
import fxfuse.compiling
times.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""


def milliseconds(bytecode: str) -> list[float]:
    """Of torch, fxfuse, its backend and its compile, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", TIMES, bytecode],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [1e3 * seconds for seconds in json.loads(done.stdout)]


def main() -> int:
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else PROCESSES
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        milliseconds(folder)
        for name, bytecode in (("bytecode cached", folder), ("no bytecode", "")):
            runs = [milliseconds(bytecode) for _ in range(processes)]
            torch, fxfuse, backend, first = map(statistics.median, zip(*runs, strict=True))
            slowest = max(slowest, fxfuse + backend)
            print(
                f"{name}: torch {torch:.0f} ms, fxfuse {fxfuse:.1f} ms more, "
                f"fxfuse.backend {backend:.1f} ms more; at the first compile {first:.0f} ms"
            )
    held = "held" if slowest < TARGET_MS else "missed"
    print(f"{processes} processes; target < {TARGET_MS} ms beyond torch: {held}")
    return int(slowest >= TARGET_MS)


if __name__ == "__main__":
    sys.exit(main())
