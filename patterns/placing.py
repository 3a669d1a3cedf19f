"""Placing: which axis of a cache is its batch, its heads, its slots' or its channels'.

In come a cache write and the stream it stores, out comes the `Layout` of the record, the slots as
the op takes them, and for v the stream itself: the stored rows as they are. Axes are told apart by
what walks them, never by their size.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import torch

from fxfuse.patterns.access import CHANNELS, Refused, placed_access
from fxfuse.patterns.atoms import Atoms, walking
from fxfuse.patterns.cut import seen_from
from fxfuse.patterns.read import Reading
from fxfuse.patterns.record import Layout, Pass, Stream
from fxfuse.patterns.site import Access, Decoded, Step, StoreWrite
from fxfuse.patterns.value import Kind, Leaf, Size, Value, product
from fxfuse.slots import Call, Slot

aten = torch.ops.aten

Sizes: TypeAlias = tuple[Size, Size]  # batch rows and tokens
NAMES = {"b": "batch", "t": "tokens", "h": "heads", "d": CHANNELS}


@dataclasses.dataclass(frozen=True)
class Placed:
    """A cache's layout; `flat` where its slots walk batch rows and tokens as one axis."""

    layout: Layout
    flat: bool


def placed(reading: Reading, store: StoreWrite, decoded: Decoded, roots: Sequence[Slot]) -> Placed:
    """Where the cache has the rows of a stream. Raises Refused unless the stored value is the whole
    stream, once.
    """
    value = seen_from(reading, decoded.slot, store.value, store.through)
    if value is None or len(value.terms) != 1:
        raise Refused("stored rows that are no view of the rotated ones")
    (factor,) = value.terms[0].factors
    shape = list(decoded.slot.shape)
    walked = [walking(index, size) for index, size in zip(factor.axes, shape, strict=True)]
    rows = [() if axis is None else (axis,) for axis in decoded.rows]
    whole: dict[str, Atoms] = {}
    for letter, axes in zip("bthd", (*rows, decoded.channel_axes), strict=True):
        every = [walked[axis] for axis in axes]
        if None in every:
            raise Refused(f"rows of shape {list(store.value.shape)} that are a part of {shape}")
        whole[letter] = tuple(atom for atoms in every for atom in atoms or ())
    return _placed(store, value, whole, roots)


def _placed(
    store: StoreWrite, value: Value, whole: dict[str, Atoms], roots: Sequence[Slot]
) -> Placed:
    tokens = _tokens(value, store)
    flat = bool(whole["b"]) and tokens == whole["b"] + whole["t"]
    if tokens != whole["t"] and not flat:
        raise Refused(f"slots along {_name(tokens, whole)} of rows {_names(value, whole)}")
    if store.axes:
        if (value.dims[1], value.dims[2]) != (whole["h"], whole["d"]) or (whole["b"] and not flat):
            raise Refused(f"rows {_names(value, whole)} where the op takes [T, G, D]")
        return Placed(Layout(store.axes, _index(store, roots), store.cast), flat)
    left = dict(whole)
    del left["t"]
    if flat:
        left["b"] = ()
    letters = []
    for axis, place in enumerate(store.places):
        if axis in store.indexed:
            letters.append(str(place))
            continue
        letters.append(_letter(_atoms(value, place), left))
    if any(left.values()):
        wanted = [NAMES[x] for x, atoms in left.items() if atoms]
        raise Refused(f"rows {_names(value, whole)} in a cache without an axis for {wanted[0]}")
    axes = _named(letters, "h" if flat else "bh")
    return Placed(Layout(axes, _index(store, roots), store.cast), flat)


def _named(letters: list[str], rows: str) -> str:
    """The axes; those of size 1 are the `rows` that nothing else is."""
    missing = [x for x in rows if x not in letters]
    for i in reversed(range(len(letters))):
        if letters[i] == "_" and missing:
            letters[i] = missing.pop()
    return "".join(letters)


def _letter(atoms: Atoms, left: dict[str, Atoms]) -> str:
    """The letter of a cache's axis that some atoms walk; what it takes is no longer `left`."""
    if not atoms:
        return "_"
    for letter in "bh":
        if left.get(letter) == atoms:
            left[letter] = ()
            return letter
    channels = left["d"]
    if channels[: len(atoms)] == atoms:
        # The outer part first, the inner one after it, wherever they stand.
        inner = "e" in left
        left["d"] = channels[len(atoms) :]
        if inner and left["d"]:
            raise Refused("channels along more than two axes of a cache")
        left["e"] = ()
        return "e" if inner else "d"
    raise Refused("a cache whose axes are no axes of its rows")


def _index(store: StoreWrite, roots: Sequence[Slot]) -> tuple[tuple[int, int, int], ...]:
    return tuple((roots.index(i.slots), i.divisor, i.modulus) for i in store.indices)


def stored_copy(
    reading: Reading, store: StoreWrite, k: Placed, roots: Sequence[Slot], sizes: Sizes
) -> tuple[Decoded, Layout] | None:
    """v as a stream, and its cache's layout: the stored rows as they are, if they are a plain view
    of one tensor of the graph. Their axes are those of k's rows, in the same order.
    """
    source, reader = _source(store)
    value = seen_from(reading, source, store.value, store.through)
    plain = reading.values[source]
    if value is None or len(value.terms) != 1 or len(value.terms[0].factors) != 1:
        return None
    if len(plain.terms) != 1 or len(plain.terms[0].factors) != 1:
        return None
    if set(plain.terms[0].coefficients) != {1.0} or set(value.terms[0].coefficients) != {1.0}:
        return None
    letters = _like(k.layout, store)
    if letters is None:
        return None
    (factor,) = value.terms[0].factors
    groups = {x: _atoms(value, store.places[i]) for i, x in enumerate(letters) if x in "bhde"}
    if store.axes:
        groups.pop("e", None)
    tokens = _tokens(value, store)
    by_row = _by_row(tokens, sizes) if k.flat else None
    rows = [*(by_row or (groups.get("b", ()), tokens)), groups.get("h", ())]
    channels = groups["d"] + groups.get("e", ())
    size = 1
    for atom in channels:
        size *= atom.size
    if not isinstance(size, int):
        return None
    steps = placed_access(factor, [*rows, channels])
    if k.flat and by_row is None:
        steps = (*steps, ("squeeze", 0), _unflattened(sizes))
    leaf = Leaf(
        -1,
        source.shape,
        source.dtype,
        reading.kinds[source],
        source,
        reading.versions_at(reader, source.storage),
    )
    stream = Stream(
        channels=size,
        norm=None,
        rotation=None,
        passes=(Pass(0, 0, size),),
        dtype=str(source.dtype).removeprefix("torch."),
        keep=False,
    )
    axis = {letter: store.places[i] for i, letter in enumerate(letters)}
    rows_of = (axis.get("b"), store.tokens[-1] if store.tokens else None, axis.get("h"))
    copy = Decoded(source, value, stream, rows_of, Access(leaf, steps))
    return copy, Layout(letters, _index(store, roots), store.cast)


def _source(store: StoreWrite) -> tuple[Slot, Call]:
    """The tensor that the stored rows are cast from, and the call that reads it; views after it are
    the rows'.
    """
    slot, reader = store.value, store.call
    left = set(store.through)
    while left and slot.call is not None:
        reader = slot.call
        left.discard(reader)
        slot = store.through.get(reader, reader.inputs()[0])
    return slot, reader


def _like(k: Layout, store: StoreWrite) -> str | None:
    """The letters of v's cache: those of k's axes, without the split where v has none."""
    if store.axes:
        return store.axes
    rows = [x for x in k.axes if x in "bhde_"]
    free = len(store.places) - len(store.indexed)
    if len(rows) == free + 1 and "e" in rows:
        rows.remove("e")
    if len(rows) != free:
        return None
    letters = iter(rows)
    return "".join(
        str(place) if axis in store.indexed else next(letters)
        for axis, place in enumerate(store.places)
    )


def _by_row(tokens: Atoms, sizes: Sizes) -> tuple[Atoms, Atoms] | None:
    """What walks batch rows, and what walks their tokens, where one axis walks both."""
    parts = ((tokens[:i], tokens[i:]) for i in range(len(tokens) + 1))
    fits = (p for p in parts if tuple(product(a.size for a in side) for side in p) == sizes)
    return next(fits, None)


def _unflattened(sizes: Sizes) -> Step:
    """Rows by batch row and token; either of their sizes may be symbolic."""
    batch, tokens = sizes
    if isinstance(tokens, int):
        return ("unflatten", 0, (-1, tokens))
    if isinstance(batch, int):
        return ("unflatten", 0, (batch, -1))
    raise Refused("slots of as many batch rows and tokens as only the run knows")


def slots_access(
    reading: Reading, stores: Sequence[StoreWrite], root: Slot, flat: bool, sizes: Sizes
) -> Access:
    """What indices are made of, as [B | 1, T]. Raises Refused where it is written in between."""
    readers = [i.reader for store in stores for i in store.indices if i.slots is root]
    versions = {reading.versions_at(reader, root.storage) for reader in readers}
    if len(versions) > 1:
        raise Refused("slots that are written between two uses")
    leaf = Leaf(-1, root.shape, root.dtype, Kind.DATA, root, versions.pop())
    if root.shape == (sizes if flat else (1, sizes[1])):
        return Access(leaf, ())
    joined: tuple[Step, ...] = (("flatten", 0, 1),) if len(root.shape) == 2 else ()
    return Access(leaf, (*joined, _unflattened(sizes) if flat else ("unsqueeze", 0)))


def scale_access(reading: Reading, store: StoreWrite, axes: str, flat: bool) -> Access | None:
    """A cache's scale tensor as [1, T | 1, G | 1] or one number. Raises Refused for others."""
    if store.scale is None:
        return None
    by, call = store.scale
    leaf = Leaf(-1, by.shape, by.dtype, Kind.DATA, by, reading.versions_at(call, by.storage))
    rank = len(by.shape)
    if all(size == 1 for size in by.shape):
        steps: tuple[Step, ...] = (("reshape", (1, 1, 1)),)
        return Access(leaf, steps)
    if store.axes and list(by.shape) == [store.value.shape[1]]:
        return Access(leaf, (("view", (1, 1, -1)),))
    if store.axes:
        raise Refused(f"a scale {list(by.shape)}, wanted one element or {store.value.shape[1]}")
    names = _letters(reading, store, axes, call.outs[0])[-rank:]
    walked = {names[i]: i for i, size in enumerate(by.shape) if size != 1}
    if "d" in walked:
        raise Refused("a scale that differs by channel")
    if "" in walked or (flat and "t" in walked):
        raise Refused("a scale by row of rows that are regrouped before they are stored")
    order = [walked[x] for x in "bth" if x in walked]
    others = [i for i in range(rank) if i not in order]
    made: list[Step] = (
        [("permute", (*others, *order))] if others + order != list(range(rank)) else []
    )
    made += [("select", 0, 0)] * len(others)
    made += [("unsqueeze", i) for i, x in enumerate("bth") if x not in walked]
    return Access(leaf, tuple(made))


def _letters(reading: Reading, store: StoreWrite, axes: str, origin: Slot) -> list[str]:
    """What each axis of a tensor is in the rows that a cast and views make of it: "b", "t" or "h",
    "d" of channels or a part of them, "" of what is none of these.
    """
    value = seen_from(reading, origin, store.value, store.through)
    if value is None or len(value.terms) != 1:
        return [""] * len(origin.shape)
    found = {_tokens(value, store): "t"}
    for letter, place in zip(axes, store.places, strict=True):
        atoms = _atoms(value, place) if letter in "bhde" else ()
        found |= {(atom,): "d" for atom in atoms} if letter in "de" else {atoms: letter}
    (factor,) = value.terms[0].factors
    each = [walking(index, size) for index, size in zip(factor.axes, origin.shape, strict=True)]
    return [found.get(atoms, "") if atoms else "" for atoms in each]


def _atoms(value: Value, axis: int | None) -> Atoms:
    return () if axis is None else value.dims[axis]


def _tokens(value: Value, store: StoreWrite) -> Atoms:
    return tuple(atom for axis in store.tokens for atom in value.dims[axis])


def _name(atoms: Atoms, whole: dict[str, Atoms]) -> str:
    names = {whole[x]: NAMES[x] for x in reversed("bthd") if whole[x]}
    return names.get(atoms, "others" if atoms else "1")


def _names(value: Value, whole: dict[str, Atoms]) -> str:
    return f"[{', '.join(_name(atoms, whole) for atoms in value.dims)}]"
