"""One model of every spelling, eager against compiled, with the exact number of its sites.

The rows of expected.txt are the counts. Where a change is meant:

    python -m tests.sweep --accept
"""

from __future__ import annotations

import pytest

from fxfuse.sweep.measure import Plan, measure
from fxfuse.sweep.results import Results
from tests.sweep.expected import read, rows_of
from tests.sweep.sample import SAMPLE

pytestmark = pytest.mark.null


@pytest.mark.parametrize("name", SAMPLE)
def test_sites_of(name: str) -> None:
    unit = measure(name, Plan())
    assert not unit.not_run
    assert [(r.scenario, r.message) for r in unit.runs if r.status in ("wrong", "crash")] == []
    wanted = [str(row) for row in read().values() if row.unit == name]
    assert sorted(str(row) for row in rows_of(Results({}, {name: unit})).values()) == wanted
