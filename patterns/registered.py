"""Cache ops of other libraries: what `fxfuse.register_store` enters, one entry an op.

In comes one ATen call of such an op, out come its writes of k and v, as its contract says them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from fxfuse.patterns.access import Refused
from fxfuse.patterns.casts import FORMATS
from fxfuse.patterns.record import Cast
from fxfuse.patterns.site import CacheIndex, StoreWrite
from fxfuse.patterns.stores import INTEGERS, LAYOUTS
from fxfuse.settings import FxfuseError
from fxfuse.slots import Call, Slot


@dataclasses.dataclass(frozen=True)
class CacheOp:
    """The contract of an op that writes rows into caches; see `register_store`."""

    op: Any
    key: str
    key_cache: str
    slots: str
    value: str | None
    value_cache: str | None
    offsets: str | None
    layout: str
    value_layout: str
    negative: Literal["skip", "wrap", "invalid"]
    skipped_slot: int | str | None
    key_scale: str | None
    value_scale: str | None
    scale: Literal["divide", "multiply"]
    format: torch.dtype | None
    limit: float
    when: tuple[tuple[str, Any], ...]

    def read(self, call: Call) -> list[StoreWrite]:
        """The writes of a call. Raises Refused where it is not the one the contract is about."""
        names = [a.name for a in self.op._schema.arguments]
        given = {a.name: a.default_value for a in self.op._schema.arguments}
        given |= dict(zip(names, call.args, strict=False)) | call.kwargs
        for name, wanted in self.when:
            if given[name] != wanted:
                raise Refused(f"{self.op} with {name}={given[name]!r}, registered for {wanted!r}")
        writes = [self._write(call, given, self.key, self.key_cache, self.layout, self.key_scale)]
        if self.value is not None and self.value_cache is not None:
            writes.append(
                self._write(
                    call, given, self.value, self.value_cache, self.value_layout, self.value_scale
                )
            )
        return writes

    def _write(
        self,
        call: Call,
        given: Mapping[str, Any],
        rows: str,
        cache: str,
        layout: str,
        scale: str | None,
    ) -> StoreWrite:
        x, memory, slots = given[rows], given[cache], given[self.slots]
        offsets = given[self.offsets] if self.offsets else None
        for name, slot in ((rows, x), (cache, memory), (self.slots, slots)):
            if not isinstance(slot, Slot):
                raise Refused(f"{self.op} without a tensor {name}")
        if len(x.shape) != 3 or len(memory.shape) != len(layout):
            raise Refused(
                f"{rows} {list(x.shape)} and {cache} {list(memory.shape)} of {self.op}, "
                f"wanted [T, G, D] and axes {layout}"
            )
        for index in (slots, offsets):
            if index is not None and (len(index.shape) != 1 or index.dtype not in INTEGERS):
                raise Refused(f"slots {list(index.shape)} of {index.dtype}, wanted integers [T]")
        sizes = {letter: memory.shape[i] for i, letter in enumerate(layout)}
        if slots.shape[0] != x.shape[0]:
            raise Refused(f"{slots.shape[0]} slots for {x.shape[0]} rows")
        if sizes["h"] != x.shape[1] or sizes["d"] * sizes.get("e", 1) != x.shape[2]:
            raise Refused(f"{cache} {list(memory.shape)} for rows {list(x.shape)}")
        by = given[scale] if scale else None
        places = {"h": 1, "d": 2, "e": 2}
        digits = frozenset(i for i, letter in enumerate(layout) if letter.isdigit())
        return StoreWrite(
            call,
            memory,
            x,
            tuple(int(a) if a.isdigit() else places[a] for a in layout),
            digits,
            (0,),
            _indices(call, layout, sizes, slots, offsets),
            self.negative,
            self._cast(memory, x, by),
            scale=(by, call) if isinstance(by, Slot) else None,
            axes=layout,
            skipped=self._skipped(given),
        )

    def _skipped(self, given: Mapping[str, Any]) -> int | None:
        named = self.skipped_slot
        slot = given[named] if isinstance(named, str) else named
        if slot is not None and not isinstance(slot, int):
            raise Refused(f"{self.op} skips a slot that is no number: {slot}")
        return slot

    def _cast(self, memory: Slot, rows: Slot, by: Any) -> Cast:
        number = memory.dtype if memory.dtype in FORMATS else self.format
        if memory.dtype == rows.dtype:
            return Cast()
        if number not in FORMATS or memory.dtype not in (number, torch.uint8):
            raise Refused(f"a cache of {memory.dtype} for rows of {rows.dtype}")
        if by is not None and not isinstance(by, Slot):
            raise Refused(f"{self.op} with a scale that is no tensor")
        return Cast(FORMATS[number], self.scale if by is not None else "", 1.0, self.limit)


def _indices(
    call: Call, layout: str, sizes: Mapping[str, Any], slots: Slot, offsets: Slot | None
) -> tuple[CacheIndex, ...]:
    """Index i of n: slots // (the sizes after it) % its own size, the first without a modulus."""
    digits = sorted(x for x in layout if x.isdigit())
    found: list[CacheIndex] = []
    after = 1
    for i in reversed(range(len(digits))):
        root = slots if offsets is None or i == 0 else offsets
        first = i == 0 or (offsets is not None and i == 1)
        size, by = sizes[digits[i]], after if i or offsets is None else 1
        if not isinstance(by, int) or not (first or isinstance(size, int)):
            raise Refused("pages of a size that only the run knows")
        found.insert(0, CacheIndex(root, by, 0 if first else size, call))
        after = after * size if isinstance(size, int) else size
    return tuple(found)


LETTERS = frozenset("hde012")


def register_store(
    op: Any,
    *,
    key: str,
    key_cache: str,
    slots: str,
    value: str | None = None,
    value_cache: str | None = None,
    offsets: str | None = None,
    layout: str = "01hd",
    value_layout: str | None = None,
    negative: Literal["skip", "wrap", "invalid"] = "skip",
    skipped_slot: int | str | None = None,
    key_scale: str | None = None,
    value_scale: str | None = None,
    scale: Literal["divide", "multiply"] = "divide",
    format: torch.dtype | None = None,
    limit: float = 0.0,
    when: Mapping[str, Any] | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Tell fxfuse that a library's op writes rows of k (and v) into caches, so that it is fused.

    Example:
        fxfuse.register_store(
            torch.ops.mylib.reshape_and_cache.default,
            key="key", value="value", key_cache="key_cache", value_cache="value_cache",
            slots="slot_mapping", layout="01hd", when={"kv_cache_dtype": "auto"},
        )

    op       an OpOverload that mutates its caches and returns nothing
    key, value, key_cache, value_cache, slots, offsets, key_scale, value_scale
             the names of its arguments: rows [T, G, D], caches, slots [T], scales of one element
             or [G]
    layout, value_layout
             a letter for each axis of a cache: "h" heads, "d" channels, digits the slot's indices
             (index i counts what the axes of higher digits hold: "01hd" is [blocks, page, G, D]);
             with an axis "e" channels are split, d // size of e and d % size of e. Paged
             attention's keys are "0hd1e", its values "0hd1", shuffled ones "0h1d2"
    offsets  an argument with the place in the page, where slots are blocks
    negative what a slot below 0 means: "skip" leaves the row out, "wrap" counts from the end,
             "invalid" never comes
    skipped_slot
             one more slot whose row is left out, before anything else is said of it: a number
             (-1, the count of slots), or the name of the argument that has it, None there for no
             slot; the others below 0 are what `negative` says
    scale    for caches of 8 bits: whether rows are divided by their scale or multiplied
    format   what a uint8 cache's bits are, such as torch.float8_e4m3fn
    limit    rows are clamped to +-limit before they are cast; 0.0: not
    when     values that other arguments must have; calls with others stay as they are

    Mutates: the table of cache writes; the end of a `with` takes the entry out again.
    Errors: FxfuseError for arguments that the op has not, and for letters that say nothing.
    """
    said = [key, value, key_cache, value_cache, slots, offsets, key_scale, value_scale]
    said.append(_name_in(skipped_slot))
    _check_op(op, [*(name for name in said if name is not None), *(when or {})])
    if (value is None) != (value_cache is None):
        raise FxfuseError("fxfuse.register_store: wanted value and value_cache, or neither")
    other = value_layout or layout
    _check_axes(layout, other)
    entry = CacheOp(
        op, key, key_cache, slots, value, value_cache, offsets, layout, other, negative,
        skipped_slot, key_scale, value_scale, scale, format, limit, tuple((when or {}).items()),
    )  # fmt: skip
    LAYOUTS[op] = entry.read
    return _until_end(op)


def _check_op(op: Any, said: list[str]) -> None:
    if op in LAYOUTS:
        raise FxfuseError(f"fxfuse.register_store: {op} is registered already")
    if op._schema.returns:
        raise FxfuseError(f"fxfuse.register_store: {op} returns something, wanted nothing")
    names = {a.name for a in op._schema.arguments}
    for name in said:
        if name not in names:
            raise FxfuseError(
                f"fxfuse.register_store: {op} has no argument {name}, it has {sorted(names)}"
            )


def _check_axes(*layouts: str) -> None:
    for axes in layouts:
        digits = sorted(x for x in axes if x.isdigit())
        whole = digits == [str(i) for i in range(len(digits))] and len(set(axes)) == len(axes)
        if not set(axes) <= LETTERS or not digits or not {"h", "d"} <= set(axes) or not whole:
            raise FxfuseError(
                f"fxfuse.register_store: layout {axes!r}, wanted h, d and 0, perhaps 1, 2 and e"
            )


def _name_in(skipped_slot: Any) -> str | None:
    """The argument that names the slot, if one does."""
    if not isinstance(skipped_slot, (int, str, type(None))):
        raise FxfuseError(
            f"fxfuse.register_store: skipped_slot={skipped_slot}, wanted a number or an argument's "
            "name"
        )
    return skipped_slot if isinstance(skipped_slot, str) else None


@contextlib.contextmanager
def _until_end(op: Any) -> Iterator[None]:
    try:
        yield
    finally:
        LAYOUTS.pop(op, None)
