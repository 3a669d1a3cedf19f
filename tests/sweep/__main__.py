"""The sample that CI runs, against tests/models/expected.txt: what is wrong, and what is lost.

python -m tests.sweep --jobs 2
python -m tests.sweep --accept    # where a change of counts is meant
"""

from __future__ import annotations

import argparse
import sys

from fxfuse.sweep.command import run_missing
from fxfuse.sweep.measure import Plan
from fxfuse.sweep.results import Results
from fxfuse.sweep.summary import failures, summary
from tests.sweep import expected
from tests.sweep.sample import SAMPLE


def main() -> int:
    """The exit status: 1 for a wrong result, a rotation that is left, or a lost site."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep")
    parser.add_argument("--jobs", type=int, default=1, help="units side by side")
    parser.add_argument("--accept", action="store_true", help=f"write to {expected.FILE.name}")
    options = parser.parse_args()
    results = Results()
    run_missing(list(SAMPLE), Plan(), results, jobs=options.jobs)
    print(summary(results))
    if options.accept:
        expected.accept(results)
    problems = [*failures(results), *expected.lost_sites(results)]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
