"""Axis maps: which of a token's several positions each channel pair turns by.

    0 1 2 0 1 2 0 0    ->    all by axis 0, but (1, 4) by axis 1 and (2, 5) by axis 2

In comes a map of one axis for each pair (or for each column of a table), out come arithmetic runs
that paint it one over the other: what a kernel can compute instead of look up.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from fxfuse.patterns.record import Pair, Record, Stream


@dataclasses.dataclass(frozen=True)
class Run:
    """Pairs first, first + step, .. (`count` of them) turn by the position on one axis."""

    axis: int
    first: int
    step: int
    count: int


@functools.cache
def runs_of(axes: tuple[int, ...]) -> tuple[Run, ...]:
    """The runs of a map, later ones over earlier ones; the first is the whole map."""
    painted = [_over(base, axes) for base in sorted(set(axes))]
    return min(painted, key=len)


def _over(base: int, axes: tuple[int, ...]) -> tuple[Run, ...]:
    """The map as runs over one axis everywhere."""
    runs = [Run(base, 0, 1, len(axes))]
    for axis in sorted(set(axes) - {base}):
        left = [i for i, a in enumerate(axes) if a == axis]
        while left:
            run = _first_run(axis, left)
            taken = {run.first + run.step * i for i in range(run.count)}
            left = [i for i in left if i not in taken]
            runs.append(run)
    return tuple(runs)


def _first_run(axis: int, places: Sequence[int]) -> Run:
    """The even steps that begin with the first two of some places in order."""
    first, step = places[0], places[1] - places[0] if len(places) > 1 else 1
    there, count = set(places), 1
    while first + step * count in there:
        count += 1
    return Run(axis, first, step, count)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a table that pairs read: the axis of each from the first on."""

    first: int
    axes: tuple[int, ...]


@functools.cache
def columns_of(record: Record, table: Literal["cos", "sin"]) -> Columns | None:
    """The columns of a table that is read by axes; None where tokens have one position. A column
    between them that no pair reads has the axis that most have.

    Errors: ValueError where two pairs read one column by different axes, or q has axes and k none.
    """
    found: dict[int, int] = {}
    turns = [s.rotation for s in (record.q, record.k) if s is not None and s.rotation is not None]
    if len({bool(turn.axes) for turn in turns}) > 1:
        raise ValueError("fxfuse: record: q and k share positions, so both have axes or neither")
    for turn in turns:
        for i, axis in enumerate(turn.axes):
            pair = getattr(turn, table)
            for column in (pair.first + pair.step * i, pair.second + pair.step * i):
                if found.setdefault(column, axis) != axis:
                    raise ValueError(
                        f"fxfuse: record: column {column} of {table} is read by axes "
                        f"{found[column]} and {axis}; give each its own column"
                    )
    if not found:
        return None
    most = Counter(found.values()).most_common(1)[0][0]
    first, end = min(found), max(found) + 1
    return Columns(first, tuple(found.get(column, most) for column in range(first, end)))


@functools.cache
def by_token(record: Record) -> Record:
    """The record over the tables that lookups by axes give: they begin at the first column read."""
    cos, sin = columns_of(record, "cos"), columns_of(record, "sin")
    if cos is None or sin is None:
        return record

    def moved(stream: Stream) -> Stream:
        turn = stream.rotation
        if turn is None:
            return stream
        pairs = (_moved(turn.cos, cos.first), _moved(turn.sin, sin.first))
        turn = dataclasses.replace(turn, cos=pairs[0], sin=pairs[1], axes=())
        return dataclasses.replace(stream, rotation=turn)

    k = record.k and moved(record.k)
    return dataclasses.replace(record, q=moved(record.q), k=k)


def _moved(pair: Pair, start: int) -> Pair:
    return Pair(pair.first - start, pair.second - start, pair.step)
