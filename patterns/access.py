"""Operands of an op as views of the graph's tensors: from a factor's index maps to the steps of an
`Access`.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import torch

from fxfuse.patterns.atoms import divide
from fxfuse.patterns.site import Access, Step
from fxfuse.patterns.value import Atom, Factor, Index, Leaf, Size

Label: TypeAlias = "Atom | str"
CHANNELS = "channels"


class Refused(Exception):
    """A value that is not the target, or is one that no op serves; the text says why."""


def window(
    source: Leaf, heads: tuple[Atom, int] | None, start: int, channels: int
) -> tuple[int, int, int]:
    """Where a head's channels lie on the source's last axis: (first element, inner start,
    channels).
    """
    size = source.shape[-1]
    if heads is None:
        return start, 0, channels
    atom, stride = heads
    if channels > stride:
        raise Refused(f"heads of {channels} channels only {stride} apart")
    inner = start % stride
    if inner + channels > stride or start - inner + atom.size * stride > size:
        inner = 0
    if start - inner + atom.size * stride > size:
        raise Refused("heads that end outside the projection")
    return start - inner, inner, channels


def feature_access(
    x: Factor, groups: Sequence[Sequence[Atom]], where: tuple[int, int, int]
) -> Access:
    """The source as [B, T, H, D]."""
    first, inner, channels = where
    last = len(x.axes) - 1
    size = x.leaf.shape[-1]
    heads = [(a, s) for a, s in x.axes[last].strides if s]
    steps: list[Step] = []
    labels: list[Label] = [*_axes(last), CHANNELS]
    if heads:
        atom, stride = heads[0]
        if atom.size * stride != size:
            steps.append(("narrow", last, first, atom.size * stride))
        steps.append(("unflatten", last, (atom.size, stride)))
        labels.insert(last, atom)
        if channels != stride:
            steps.append(("narrow", last + 1, inner, channels))
    elif channels != size:
        steps.append(("narrow", last, first, channels))
    row_steps, labels = _rows(x, labels, last)
    arranged = _arrange(labels, groups, channels=True)
    missing = [a for g in groups for a in g if a not in labels]
    if missing:
        raise Refused("a source that is repeated before it is used")
    return Access(x.leaf, (*steps, *row_steps, *arranged))


def placed_access(x: Factor, groups: Sequence[Sequence[Atom]]) -> tuple[Step, ...]:
    """The steps that give a tensor one axis for each group, of size 1 for an empty one."""
    labels: list[Label] = list(_axes(len(x.axes)))
    steps, labels = _rows(x, labels, len(x.axes))
    if any(a not in labels for group in groups for a in group):
        raise Refused("stored rows that are repeated")
    return (*steps, *_arrange(labels, groups, channels=False))


def rows_access(
    factor: Factor, groups: Sequence[Sequence[Atom]], first: Sequence[Step] = ()
) -> Access:
    """A factor by row as [B | 1, T | 1, H | 1], after the first steps."""
    if factor.leaf.slot is None:
        raise Refused("a row factor that no node of the graph holds")
    labels: list[Label] = list(_axes(len(factor.axes)))
    steps, labels = _rows(factor, labels, len(factor.axes))
    return Access(factor.leaf, (*first, *steps, *_arrange(labels, groups, channels=False)))


def rstd_access(
    rows: Factor, groups: Sequence[Sequence[Atom]], count: int, eps: float, scale: float
) -> Access:
    """scale / sqrt(mean(x * x) + eps) of `count` channels of a tensor's rows, by row."""
    *axes, channel = rows.axes
    if any(stride for _, stride in channel.strides):
        raise Refused("a statistic by head that no node of the graph holds")
    steps: list[Step] = []
    if count != rows.leaf.shape[-1]:
        steps.append(("narrow", -1, channel.offsets[0], count))
    if rows.leaf.dtype != torch.float64:
        steps.append(("float",))
    steps += [("square",), ("mean", -1), ("add", eps), ("rsqrt",)]
    if scale != 1.0:
        steps.append(("mul", scale))
    return rows_access(Factor(rows.leaf, tuple(axes)), groups, steps)


def table_access(
    table: Factor, groups: Sequence[Sequence[Atom]], channels: Sequence[int]
) -> Access:
    """A table as [B | 1, T | 1, R] or [B | 1, T | 1, H | 1, R], one axis for each group; its axes
    `channels` are flattened to R, a complex one is taken as its real view, [.., 2 R].
    """
    if channels[-1] != len(table.axes) - 1:
        order = (*(j for j in range(len(table.axes)) if j not in channels), *channels)
        shape, axes = (tuple(x[j] for j in order) for x in (table.leaf.shape, table.axes))
        moved = Factor(dataclasses.replace(table.leaf, shape=shape), axes)
        access = table_access(moved, groups, range(len(order) - len(channels), len(order)))
        return Access(table.leaf, (("permute", order), *access.steps))
    last = channels[0]
    heads = [(a, s) for index in table.axes[last:] for a, s in index.strides if s]
    labels: list[Label] = [*_axes(last), CHANNELS]
    steps: list[Step] = [("flatten", last)] if len(channels) > 1 else []
    if table.leaf.part:
        steps = [("view_as_real",), ("flatten", last)]
    if heads:
        (atom, stride), *more = heads
        if more or steps or atom.size * stride != table.leaf.shape[last]:
            raise Refused("a table whose channels differ by row")
        steps = [("unflatten", last, (atom.size, stride))]
        labels.insert(last, atom)
    row_steps, labels = _rows(table, labels, last)
    return Access(table.leaf, (*steps, *row_steps, *_arrange(labels, groups, channels=True)))


def weight_access(weight: Factor, head: Sequence[Atom], start: int, channels: int) -> Access:
    """A weight as [D], or [H, D] where it differs by head."""
    last = len(weight.axes) - 1
    if last and head and weight.axes[last - 1].strides == ((head[0], 1),):
        return _by_head(weight, head[0], start, channels)
    strides = [(a, s) for a, s in weight.axes[last].strides if s]
    if any(s for index in weight.axes[:last] for _, s in index.strides):
        raise Refused("a weight that differs by row")
    steps: list[Step] = [("select", 0, index.offsets[0]) for index in weight.axes[:last]]
    size = weight.leaf.shape[-1]
    if not strides:
        if channels != size:
            steps.append(("narrow", -1, start, channels))
        return Access(weight.leaf, tuple(steps))
    (atom, stride), *more = strides
    if more or [atom] != list(head) or stride < channels:
        raise Refused("a weight at irregular places")
    if atom.size * stride != size or start:
        raise Refused("a weight that is a part of another")
    steps.append(("unflatten", -1, (atom.size, stride)))
    if stride != channels:
        steps.append(("narrow", -1, 0, channels))
    return Access(weight.leaf, tuple(steps))


def _by_head(weight: Factor, head: Atom, start: int, channels: int) -> Access:
    """A weight of [.., H, D] whose heads are an axis of their own."""
    *outer, heads, channel = weight.axes
    if any(s for index in (*outer, channel) for _, s in index.strides):
        raise Refused("a weight that differs by row")
    if any(heads.offsets) or weight.leaf.shape[-2] != head.size:
        raise Refused("a weight that is a part of another")
    steps: list[Step] = [("select", 0, index.offsets[0]) for index in outer]
    if channels != weight.leaf.shape[-1]:
        steps.append(("narrow", -1, start, channels))
    return Access(weight.leaf, tuple(steps))


def _axes(count: int) -> list[str]:
    return [f"axis {j}" for j in range(count)]


def _rows(factor: Factor, labels: list[Label], count: int) -> tuple[list[Step], list[Label]]:
    """Steps that turn the factor's first `count` axes into one axis for each atom."""
    steps: list[Step] = []
    for j in reversed(range(count)):
        size, index = factor.leaf.shape[j], factor.axes[j]
        if len(set(index.offsets)) > 1:
            raise Refused("channels on an inner axis of a tensor")
        atoms = sorted(index.strides, key=lambda a: -a[1])
        offset = index.offsets[0]
        if not atoms:
            steps.append(("select", j, offset))
            labels[j : j + 1] = []
        elif len(atoms) == 1 and atoms[0][1] == 1:
            if atoms[0][0].size != size:
                steps.append(("narrow", j, offset, _static(atoms[0][0].size)))
            labels[j] = atoms[0][0]
        else:
            walked = _walked(index)
            if offset or divide(size, walked) != 1:
                steps.append(("narrow", j, offset, _static(walked)))
            steps.append(("unflatten", j, tuple(_static(a.size) for a, _ in atoms)))
            labels[j : j + 1] = [a for a, _ in atoms]
    return steps, labels


def _static(size: Size) -> int:
    if not isinstance(size, int):
        raise Refused("a part of an axis whose size is not known")
    return size


def _walked(index: Index) -> Size:
    """How many elements of an axis its atoms walk together, one after the other."""
    walked: Size = 1
    for atom, stride in sorted(index.strides, key=lambda a: a[1]):
        if stride != walked:
            raise Refused("rows at irregular places")
        walked = walked * atom.size
    return walked


def _arrange(
    labels: list[Label], groups: Sequence[Sequence[Atom]], *, channels: bool
) -> list[Step]:
    """Permute the axes to the groups' order, one axis a group, the channels last."""
    wanted: list[Label] = [a for g in groups for a in g if a in labels]
    wanted += [CHANNELS] if channels else []
    if set(wanted) != set(labels):
        raise Refused("an operand that varies along another axis")
    steps: list[Step] = []
    if wanted != labels:
        steps.append(("permute", tuple(labels.index(x) for x in wanted)))
    for place, group in enumerate(groups):
        held = [a for a in group if a in labels]
        if not held:
            steps.append(("unsqueeze", place))
        elif len(held) != len(group):
            raise Refused("an operand that varies along a part of an axis")
        elif len(group) > 1:
            steps.append(("flatten", place, place + len(group) - 1))
    return steps
