"""Rotations: for each output channel the products that make it up, paired into a `Rotation`."""

import dataclasses
from typing import NamedTuple

from fxfuse.patterns.access import Refused
from fxfuse.patterns.record import Pair, Pass, Rotation
from fxfuse.patterns.value import Leaf


class Entry(NamedTuple):
    """One product that makes up an output channel."""

    coefficient: float
    channel: int
    table: Leaf | None
    place: int


def pass_through(
    entries: list[list[Entry]],
) -> tuple[Rotation | None, tuple[Pass, ...], float, Leaf | None, Leaf | None]:
    """As `pair_up`, of channels of which none is rotated."""
    sizes = {e.coefficient for row in entries for e in row}
    if len(sizes) != 1 or any(len(row) != 1 for row in entries) or min(sizes) < 0:
        raise Refused(f"channels of different scale: {sorted(sizes)}")
    if sorted(row[0].channel for row in entries) != list(range(len(entries))):
        raise Refused("channels that are used twice, or not at all")
    return None, _passes(entries, list(range(len(entries)))), sizes.pop(), None, None


def pair_up(
    entries: list[list[Entry]], channels: int
) -> tuple[Rotation | None, tuple[Pass, ...], float, Leaf | None, Leaf | None]:
    """Pair the channels; returns the rotation, the passes, the common factor, and the two
    tables.
    """
    sizes = {abs(e.coefficient) for row in entries for e in row}
    if len(sizes) != 1:
        raise Refused(f"channels of different scale: {sorted(sizes)}")
    scale = sizes.pop()
    plain: list[int] = []
    turned: dict[frozenset[int], list[int]] = {}
    for i, row in enumerate(entries):
        if len(row) == 1 and row[0].table is None:
            plain.append(i)
            continue
        if len(row) != 2 or any(e.table is None for e in row):
            raise Refused(f"channel {i} is no rotation of two channels")
        turned.setdefault(frozenset(e.channel for e in row), []).append(i)
    if not turned:
        raise Refused("no channel is rotated")
    pairs = [_pair(entries, outputs) for outputs in turned.values()]
    pairs.sort(key=lambda p: p.y[0])
    first = pairs[0]
    if any(p.tables != first.tables or p.signs != first.signs for p in pairs):
        raise Refused("pairs that differ in their tables or in the sign of their turn")
    negative = [i for i in plain if entries[i][0].coefficient < 0]
    if negative:
        raise Refused(f"channel {negative[0]} changes its sign")
    used = [c for p in pairs for c in p.x] + [entries[i][0].channel for i in plain]
    if sorted(used) != list(range(channels)):
        raise Refused("channels that are used twice, or not at all")
    rotation = Rotation(
        pairs=len(pairs),
        x=fit([p.x for p in pairs], "source channels"),
        y=fit([p.y for p in pairs], "result channels"),
        cos=fit([p.cos for p in pairs], "cos channels"),
        sin=fit([p.sin for p in pairs], "sin channels"),
        signs=first.signs,
    )
    return rotation, _passes(entries, plain), scale, *first.tables


class _Turn(NamedTuple):
    x: tuple[int, int]
    y: tuple[int, int]
    cos: tuple[int, int]
    sin: tuple[int, int]
    signs: tuple[int, int]
    tables: tuple[Leaf, Leaf]


def _pair(entries: list[list[Entry]], outputs: list[int]) -> _Turn:
    """Two outputs over the same two channels: which products are cos, which sin."""
    if len(outputs) != 2:
        raise Refused(f"channel {outputs[0]} has no partner")
    i, j = outputs
    if matrix := _matrix(entries, i, j):
        return matrix
    for a, b in ((0, 1), (1, 0)):
        c0, s0 = entries[i][a], entries[i][b]
        if c0.channel == s0.channel:
            raise Refused(f"channel {i} is turned with itself")
        c1 = next(e for e in entries[j] if e.channel == s0.channel)
        s1 = next(e for e in entries[j] if e.channel == c0.channel)
        positive = c0.coefficient > 0 and c1.coefficient > 0
        opposite = s0.coefficient * s1.coefficient < 0
        if positive and opposite and _same_table(c0, c1) and _same_table(s0, s1):
            assert c0.table is not None and s0.table is not None
            sign = 1 if s0.coefficient > 0 else -1
            return _Turn(
                (c0.channel, s0.channel),
                (i, j),
                (c0.place, c1.place),
                (s0.place, s1.place),
                (sign, -sign),
                (c0.table, s0.table),
            )
    raise Refused(f"channels {i} and {j} are no rotation: their signs or tables do not fit")


def _matrix(entries: list[list[Entry]], i: int, j: int) -> _Turn | None:
    """Two outputs by a 2 x 2 matrix of one table, which has the signs inside."""
    table = entries[i][0].table
    if table is None or table.part or any(e.table is not table for k in (i, j) for e in entries[k]):
        return None
    rows = [sorted(entries[k], key=lambda e: e.channel) for k in (i, j)]
    (c0, s0), (s1, c1) = rows
    every = (c0, s0, s1, c1)
    if len({e.place for e in every}) < 4 or c0.channel == s0.channel:
        return None
    if any(e.coefficient < 0 for e in every):
        return None
    places = (c0.place, c1.place), (s0.place, s1.place)
    return _Turn((c0.channel, s0.channel), (i, j), *places, (1, 1), (table, table))


def _same_table(a: Entry, b: Entry) -> bool:
    """One table, or the two parts of one complex table where only the place tells them apart."""
    return a.table is b.table


def fit(places: list[tuple[int, int]], what: str) -> Pair:
    """The Pair at some pairs' places. Raises Refused where they are at no even steps."""
    (first, second), step = places[0], places[1][0] - places[0][0] if len(places) > 1 else 1
    if step < 1 or any(p != (first + step * k, second + step * k) for k, p in enumerate(places)):
        raise Refused(f"{what} at irregular places")
    return Pair(first, second, step)


def _passes(entries: list[list[Entry]], plain: list[int]) -> tuple[Pass, ...]:
    runs: list[Pass] = []
    for i in plain:
        channel = entries[i][0].channel
        last = runs[-1] if runs else None
        if last and (i, channel) == (last.y_start + last.length, last.x_start + last.length):
            runs[-1] = dataclasses.replace(last, length=last.length + 1)
        else:
            runs.append(Pass(channel, i, 1))
    if len(runs) > 4:
        raise Refused("unrotated channels in too many pieces")
    return tuple(runs)
