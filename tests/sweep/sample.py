"""The units that CI runs: one or more of every spelling, small and quick to compile.

In: nothing. Out: `SAMPLE`, names of units with what each one stands for.
"""

from __future__ import annotations

SAMPLE: dict[str, str] = {
    "llama": "halves, whole head, no norm",
}
