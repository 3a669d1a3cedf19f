"""Lookups: tables that a graph takes by position for one site alone, taken by the op instead.

    cos, sin = table[positions].chunk(2, -1)

In comes a planned site, out comes one whose tables are the whole `table` and whose `positions` say
which of its rows a token turns by; or the site as it came. A table that several sites read is
looked up once for all of them, by the graph.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from fxfuse.patterns.memory import Memory
from fxfuse.patterns.site import Access, Site, Step
from fxfuse.patterns.value import Leaf
from fxfuse.slots import Call, Slot

aten = torch.ops.aten

# Table and positions of a call that takes rows of a table, None where it takes something else.
Read: TypeAlias = Callable[..., "tuple[Slot, Slot] | None"]


def _indexed(table: Slot, indices: Sequence[Any]) -> tuple[Slot, Slot] | None:
    return (table, indices[0]) if len(indices) == 1 and isinstance(indices[0], Slot) else None


def _embedded(a: Slot, b: Slot, *_: Any) -> tuple[Slot, Slot]:
    """F.embedding has the index first, aten.embedding the table."""
    return (b, a) if b.dtype.is_floating_point else (a, b)


LOOKUPS: dict[Any, Read] = {
    aten.index.Tensor: _indexed,
    aten.index_select.default: lambda table, dim, index: (table, index) if dim == 0 else None,
    aten.embedding.default: _embedded,
}


def with_lookups(
    sites: Sequence[Site], memory: Memory, holder: Mapping[Slot, fx.Node]
) -> list[Site]:
    """The sites, those that alone read a looked-up table with the lookup inside."""
    readers = Counter(leaf for site in sites for leaf in _tables(site))
    return [
        _looked_up(site, memory, holder) if all(readers[t] == 1 for t in _tables(site)) else site
        for site in sites
    ]


def _tables(site: Site) -> set[Leaf]:
    return {a.leaf for a in (site.q.cos, site.q.sin) if a is not None}


def _looked_up(site: Site, memory: Memory, holder: Mapping[Slot, fx.Node]) -> Site:
    q, turn = site.q, site.record.q.rotation
    if q.cos is None or q.sin is None or turn is None or turn.by_head:
        return site
    cos, sin = (_lookup(access, site.before, memory, holder) for access in (q.cos, q.sin))
    if cos is None or sin is None or cos.table.leaf.shape[0] != sin.table.leaf.shape[0]:
        return site
    if cos.positions.leaf.slot is not sin.positions.leaf.slot:
        return site
    if cos.positions.steps != sin.positions.steps:
        return site
    turned = dataclasses.replace(q, cos=cos.table, sin=sin.table, positions=cos.positions)
    return dataclasses.replace(site, q=turned)


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """A table as [1, N, R], and the positions of its rows as [B|1, T|1]."""

    table: Access
    positions: Access


def _lookup(
    access: Access, before: fx.Node, memory: Memory, holder: Mapping[Slot, fx.Node]
) -> _Lookup | None:
    """What stands behind a looked-up table, if the op can read that in the table's place."""
    leaf, call = access.leaf, access.leaf.slot.call
    read = LOOKUPS.get(call.op) if isinstance(call, Call) else None
    found = read(*call.args) if read is not None and not call.kwargs else None
    if found is None or leaf.part:
        return None
    table, positions = found
    rows = _row_steps(access.steps, len(leaf.shape))
    integers = positions.dtype in (torch.int32, torch.int64)
    whole = len(table.shape) == 2 and isinstance(table.shape[0], int) and table.dtype == leaf.dtype
    if rows is None or not integers or not whole or len(leaf.shape) != len(positions.shape) + 1:
        return None
    for slot in (table, positions):
        node = holder.get(slot)
        if node is None or memory.index[node] >= memory.index[before]:
            return None
        if memory.version(slot.storage, call.node) != memory.version(slot.storage, before):
            return None
    whole_table = Access(_leaf(leaf, table), (("unsqueeze", 0),))
    return _Lookup(whole_table, Access(_leaf(leaf, positions), rows))


def _leaf(like: Leaf, slot: Slot) -> Leaf:
    return dataclasses.replace(like, shape=slot.shape, dtype=slot.dtype, slot=slot, definition=None)


ROW_STEPS = ("select", "unsqueeze", "narrow")


def _row_steps(steps: Sequence[Step], rank: int) -> tuple[Step, ...] | None:
    """The steps of a table's access as steps of its positions, which lack the last axis; None
    where they touch that axis.
    """
    rows: list[Step] = []
    for name, *args in steps:
        if name == "permute":
            if args[0][-1] != rank - 1:
                return None
            args = [args[0][:-1]]
        elif name not in ROW_STEPS or not 0 <= args[0] < rank - 1 + (name == "unsqueeze"):
            return None
        rank += {"select": -1, "unsqueeze": 1}.get(name, 0)
        rows.append((name, *args))
    return tuple(rows)
