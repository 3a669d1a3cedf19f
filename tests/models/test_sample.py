"""One model of every spelling, eager against compiled, with the exact number of its sites.

The rows of expected.txt are the counts. Where a change is meant:

    python -m tests.sweep --sample --accept
"""

from __future__ import annotations

import pytest

from tests.sweep.expected import read, rows_of
from tests.sweep.measure import Plan, measure
from tests.sweep.results import Results
from tests.sweep.sample import SAMPLE
from tests.sweep.summary import failures

pytestmark = pytest.mark.null


@pytest.mark.parametrize("name", SAMPLE)
def test_sites_of(name: str) -> None:
    unit = measure(name, Plan())
    results = Results({}, {name: unit})
    assert not unit.not_run
    assert failures(results) == []
    wanted = {key: row for key, row in read().items() if row.unit == name}
    assert "\n".join(map(str, rows_of(results).values())) == "\n".join(map(str, wanted.values()))
