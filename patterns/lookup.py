"""Lookups: tables that a graph takes by position for one site alone, taken by the op instead.

    cos, sin = table[positions].chunk(2, -1)

In comes a planned site, out comes one whose tables are the whole `table` and whose `positions` say
which of its rows a token turns by; or the site as it came. A token may have several positions, and
each channel pair turn by one of them: the map is read off whatever rearranges the rows. A table
that several sites read is looked up once for all of them, by the graph.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import fx

from fxfuse.patterns import shapes
from fxfuse.patterns.access import Refused
from fxfuse.patterns.atoms import flatten_explicit
from fxfuse.patterns.gathers import gathered
from fxfuse.patterns.memory import Memory
from fxfuse.patterns.prove import Disproved
from fxfuse.patterns.prove_lookup import Looked, prove_lookup
from fxfuse.patterns.read import Reading
from fxfuse.patterns.rearranged import is_wide, rearranged
from fxfuse.patterns.record import Pair, Stream
from fxfuse.patterns.rotation import fit
from fxfuse.patterns.site import Access, Site, Step
from fxfuse.patterns.value import Atom, Factor, Index, Leaf, Opaque, Value
from fxfuse.slots import Call, Slot

log = logging.getLogger(__name__)
aten = torch.ops.aten


def with_lookups(
    sites: Sequence[Site], memory: Memory, holder: Mapping[Slot, fx.Node], disproved: list[str]
) -> list[Site]:
    """The sites, those that alone read a looked-up table with the lookup inside; what is disproved
    of these is added to the list.
    """
    readers = Counter(leaf for site in sites for leaf in _tables(site))
    found = []
    for site in sites:
        try:
            alone = all(readers[table] == 1 for table in _tables(site))
            found.append(_looked_up(site, memory, holder) if alone else site)
        except (Opaque, Refused) as reason:
            log.debug("fxfuse: %s: looked up by the graph: %s", site.q.slot.node, reason)
            found.append(site)
        except Disproved as error:
            disproved.append(f"{site.q.slot.node.name}: {error}")
            found.append(site)
        except Exception:
            name = site.q.slot.node.name
            log.warning("fxfuse: an error of fxfuse, %s keeps its lookup", name, exc_info=True)
            found.append(site)
    return found


def _tables(site: Site) -> set[Leaf]:
    return {a.leaf for a in (site.q.cos, site.q.sin) if a is not None}


def _looked_up(site: Site, memory: Memory, holder: Mapping[Slot, fx.Node]) -> Site:
    q, record, turn = site.q, site.record, site.record.q.rotation
    if q.cos is None or q.sin is None or turn is None or turn.by_head:
        return site
    cos, sin = (looked(access, site.before, memory, holder) for access in (q.cos, q.sin))
    if cos.table.leaf.shape[0] != sin.table.leaf.shape[0]:
        raise Opaque("tables of different lengths")
    if cos.positions.leaf.slot is not sin.positions.leaf.slot:
        raise Opaque("tables by different positions")
    if cos.positions.steps != sin.positions.steps:
        raise Opaque("tables by positions in different order")
    q_stream = _turned(record.q, cos.places, sin.places)
    k_stream = _turned(record.k, cos.places, sin.places) if record.k else None
    axes = {s.rotation.axes for s in (q_stream, k_stream) if s is not None and s.rotation}
    if len(axes) > 1:
        raise Opaque("q and k that turn by different axes")
    new = dataclasses.replace(record, q=q_stream, k=k_stream)
    prove_lookup(cos, sin, record, new)
    q = dataclasses.replace(
        q, stream=q_stream, cos=cos.table, sin=sin.table, positions=cos.positions
    )
    k = dataclasses.replace(site.k, stream=k_stream) if site.k and k_stream else None
    return dataclasses.replace(site, record=new, q=q, k=k)


# For each channel of a looked-up table the axis of positions that chose its row (None where a token
# has one position), and its column of the whole table.
Places: TypeAlias = tuple[tuple[int | None, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Lookup(Looked):
    """Its table is [1, N, R], its positions [B|1, T|1], or [axes, B|1, T|1] where the rows of
    several axes are mixed.
    """

    places: Places


def _turned(stream: Stream, cos: Places, sin: Places) -> Stream:
    """The stream that reads its cos and sin at their places in the whole tables."""
    turn = stream.rotation
    if turn is None:
        return stream
    found = [_members(pair, turn.pairs, at) for pair, at in ((turn.cos, cos), (turn.sin, sin))]
    axes = [{axis for members in pair for axis, _ in members} for pair in zip(*found, strict=True)]
    if any(len(each) > 1 for each in axes):
        raise Opaque("a pair that turns by two axes")
    columns = [[(a[1], b[1]) for a, b in members] for members in found]
    rotation = dataclasses.replace(
        turn,
        cos=fit(columns[0], "cos columns"),
        sin=fit(columns[1], "sin columns"),
        axes=tuple(axis for each in axes for axis in each if axis is not None),
    )
    return dataclasses.replace(stream, rotation=rotation)


def _members(pair: Pair, pairs: int, places: Places) -> list[Places]:
    """The places of both members of each pair."""
    starts, steps = (pair.first, pair.second), range(0, pairs * pair.step, pair.step)
    return [tuple(places[start + i] for start in starts) for i in steps]


def looked(
    access: Access, before: fx.Node, memory: Memory, holder: Mapping[Slot, fx.Node]
) -> _Lookup:
    """What stands behind a table, if the op can read that in its place. Raises Opaque."""
    leaf, reading = access.leaf, memory.reading
    if not isinstance(leaf.slot, Slot) or leaf.slot.call is None or leaf.part:
        raise Opaque("no table that the graph makes")
    if leaf.version != reading.versions_at(leaf.slot.call, leaf.slot.storage):
        raise Opaque("a table that is written behind its lookup")
    value = rearranged(leaf.slot, reading, lambda call: gathered(call) is not None)
    row_steps = access.steps
    if row_steps[:1] and row_steps[0][0] == "permute":
        # Channels may stand in front of the rows.
        value, row_steps = shapes.permute(value, row_steps[0][1]), row_steps[1:]
    rows, places, axis = rows_and_places(value)
    call = rows.leaf.slot.call
    found = gathered(call)
    assert found is not None
    (table, reader), positions = memory_of(found[0], call, reading), found[1]
    whole = len(table.shape) == 2 and isinstance(table.shape[0], int)
    integers = positions.dtype in (torch.int32, torch.int64)
    if not integers or not whole or len(rows.leaf.shape) != len(positions.shape) + 1:
        raise Opaque("no rows of a whole table by position")
    if any(slot.device != leaf.slot.device for slot in (table, positions)):
        raise Opaque("a table or positions on another device")
    for slot, first in ((table, reader), (positions, call)):
        node = holder.get(slot)
        if node is None or memory.index[node] >= memory.index[before]:
            raise Opaque("a table or positions that are not at hand")
        if memory.version(slot.storage, first.node) != memory.version(slot.storage, before):
            raise Opaque("a table or positions that are written behind the lookup")
    steps = (*_ordered(rows, value, axis), *_row_steps(row_steps, value, axis is not None))
    whole_table = Access(_leaf(leaf, table), (("unsqueeze", 0),))
    by = Access(_leaf(leaf, positions), steps)
    return _Lookup(value, Access(leaf, row_steps), whole_table, by, places)


COPIES = (aten._to_copy.default, aten.clone.default, aten.contiguous.default)


def memory_of(table: Slot, reader: Call, reading: Reading) -> tuple[Slot, Call]:
    """The tensor that came into the graph which a table is, but for casts and copies, and the call
    that reads it. Raises Opaque of a table that the graph computes: an op would need the whole of
    it where a compiler makes but the rows in use.
    """
    while (copy := table.call) is not None and copy.op in COPIES:
        (source,) = copy.inputs()
        if source.device != table.device or not (is_wide(source.dtype) and is_wide(table.dtype)):
            raise Opaque("a table that is moved, or is no table of floats")
        if reading.is_written(table, reader):
            raise Opaque("a table that is written behind its copy")
        table, reader = source, copy
    held = table
    while held.call is not None:
        if reading.relations.get(held.call) != "view":
            raise Opaque("a table that the graph computes")
        (held,) = held.call.inputs()
    return table, reader


def _leaf(like: Leaf, slot: Slot) -> Leaf:
    return dataclasses.replace(like, shape=slot.shape, dtype=slot.dtype, slot=slot, definition=None)


def rows_and_places(value: Value) -> tuple[Factor, Places, int | None]:
    """The rows of one lookup that a value is made of, the place of each of its channels, and which
    axis of the rows differs between channels, if one does. Raises Opaque.
    """
    last = len(value.dims) - 1
    value = flatten_explicit(value, last)
    if value.explicit != value.dims[last] or len(value.leaves()) != 1:
        raise Opaque("channels of several tables, or that differ by row")
    found: dict[int, Factor] = {}
    for term in value.terms:
        for i, coefficient in enumerate(term.coefficients):
            if coefficient:
                if i in found or coefficient != 1 or len(term.factors) != 1:
                    raise Opaque("channels that are computed")
                (factor,) = term.factors
                at = tuple(Index((index.offsets[i],), index.strides) for index in factor.axes)
                found[i] = Factor(factor.leaf, at)
    if len(found) != value.explicit[0].size:
        raise Opaque("channels that nothing fills")
    read = [found[i].axes for i in range(len(found))]
    *rows, columns = zip(*read, strict=True)
    mixed = [j for j, at in enumerate(rows) if len(set(at)) > 1]
    chosen = [index for j in mixed for index in rows[j]]
    if len(mixed) > 1 or any(index.strides for index in (*chosen, *columns)):
        raise Opaque("channels of irregular rows")
    axis = mixed[0] if mixed else None
    places = tuple(
        (at[axis].offsets[0] if axis is not None else None, at[-1].offsets[0]) for at in read
    )
    return found[0], places, axis


def _ordered(rows: Factor, value: Value, axis: int | None) -> list[Step]:
    """The steps from positions to the order of a value's rows, the mixed axis in front."""
    labels: list[Atom | str] = []
    steps: list[Step] = []
    for j, (index, size) in enumerate(zip(rows.axes[:-1], rows.leaf.shape, strict=False)):
        if j == axis:
            labels.append("axes")
        elif not index.strides:
            steps.append(("select", len(labels), index.offsets[0]))
        elif index == Index((0,), ((index.strides[0][0], 1),)) and index.strides[0][0].size == size:
            labels.append(index.strides[0][0])
        else:
            raise Opaque("a part of the positions")
    atoms = [atom for dim in value.dims[:-1] for atom in dim]
    wanted: list[Atom | str] = [*(["axes"] if axis is not None else []), *atoms]
    if set(wanted) != set(labels) or any(len(dim) > 1 for dim in value.dims[:-1]):
        raise Opaque("rows in another arrangement than positions")
    if wanted != labels:
        steps.append(("permute", tuple(labels.index(x) for x in wanted)))
    ones = [d for d, dim in enumerate(value.dims[:-1]) if not dim]
    return [*steps, *(("unsqueeze", d + (axis is not None)) for d in ones)]


ROW_STEPS = ("select", "unsqueeze", "narrow")


def _row_steps(steps: Sequence[Step], value: Value, behind: bool) -> list[Step]:
    """The steps of a table's access as steps of its positions, which lack the last axis and may
    have one more in front. Raises Opaque where they touch the last axis.
    """
    rows: list[Step] = []
    rank = len(value.dims)
    for name, *args in steps:
        if name == "permute":
            if args[0][-1] != rank - 1:
                raise Opaque("channels that are no last axis")
            front = (0,) if behind else ()
            args = [(*front, *(d + behind for d in args[0][:-1]))]
        elif name not in ROW_STEPS or not 0 <= args[0] < rank - 1 + (name == "unsqueeze"):
            raise Opaque("channels that are regrouped")
        else:
            args = [args[0] + behind, *args[1:]]
        rank += {"select": -1, "unsqueeze": 1}.get(name, 0)
        rows.append((name, *args))
    return rows
