"""The map from pairs to axes: as few runs as a kernel computes, and a column for one axis."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fxfuse.patterns.axes import columns_of, runs_of
from fxfuse.patterns.record import Record
from tests.mrope_toys import (
    axes_of,
)
from tests.sites import BY_AXES, SITES

pytestmark = pytest.mark.null


def painted(axes: tuple[int, ...]) -> list[int]:
    found = [-1] * len(axes)
    for run in runs_of(axes):
        for i in range(run.count):
            found[run.first + i * run.step] = run.axis
    return found


def test_runs_paint_their_map() -> None:
    for length in (1, 2, 6):
        for axes in itertools.product(range(3), repeat=length):
            assert painted(axes) == list(axes)


@pytest.mark.parametrize(
    ("pick", "section", "runs"),
    [
        ("contiguous", [16, 24, 24], 3),
        ("interleaved", [24, 20, 20], 3),
        ("interleaved", [11, 11, 10], 3),
        ("in turns", [8, 12, 12], 4),
    ],
)
def test_the_maps_in_use_are_few_runs(pick: str, section: list[int], runs: int) -> None:
    axes = axes_of(pick, section)
    assert painted(axes) == list(axes) and len(runs_of(axes)) == runs


@pytest.mark.parametrize("name", BY_AXES)
def test_a_record_is_read_back_from_its_text(name: str) -> None:
    assert Record.from_text(SITES[name].to_text()) == SITES[name]


def test_pairs_of_two_axes_do_not_share_a_column() -> None:
    q = SITES["mrope"].q
    assert q.rotation is not None
    other = dataclasses.replace(q, rotation=dataclasses.replace(q.rotation, axes=(1,) * 16))
    with pytest.raises(ValueError, match="column 0 of cos is read by axes 0 and 1"):
        columns_of(Record(q, other), "cos")
    plain = dataclasses.replace(q, rotation=dataclasses.replace(q.rotation, axes=()))
    with pytest.raises(ValueError, match="both have axes or neither"):
        columns_of(Record(q, plain), "cos")
