"""What debug mode checks around a fused op, as ops of torch: fxfuse_debug::before_<op>, after_<op>.

In come the op's arguments, and behind it its results. Slots and positions out of bounds are an
IndexError, NaN is a warning, and so is what differs from the reference at a site's first use.
Caches are only read. Importing this module defines the ops.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxfuse import add_norm, ops, reference, schemas
from fxfuse.patterns.record import AddNorm, Layout, Record, Store
from fxfuse.reference_store import index_of, is_skipped

log = logging.getLogger(__name__)

# The argument that a check hands on, so that the op stays behind its check, by the op's name.
CARRIERS = {"norm_rope": 0, "norm_rope_store_": 12, "add_rms_norm": 0}
SCHEMAS = {
    "norm_rope": schemas.NORM_ROPE,
    "norm_rope_store_": schemas.NORM_ROPE_STORE_,
    "add_rms_norm": schemas.ADD_RMS_NORM,
}
READERS: dict[str, Callable[[str], Record | AddNorm]] = {
    "norm_rope": ops.read_record,
    "norm_rope_store_": ops.read_record,
    "add_rms_norm": add_norm.read_record,
}
# Sums of a row and their roundings, in float32 (float64), by the row's largest number.
INSIDE = 8
# Kept for the life of the process: a Library that is collected takes its ops with it.
library: Any = torch.library.Library("fxfuse_debug", "FRAGMENT")  # type: ignore[no-untyped-call]

_told: set[tuple[str, str]] = set()
_compared: set[str] = set()


def _before(name: str, *args: Any) -> Tensor:
    *given, text, where = args
    call = _named(name, given)
    carrier: Tensor = args[CARRIERS[name]]
    if not _capturing(carrier):
        record = READERS[name](text.replace("'", '"'))
        _check_nan(call, where)
        if call.get("positions") is not None:
            _check_positions(call, where)
        if isinstance(record, Record) and record.store is not None:
            for cache, layout in (("k_cache", record.store.k), ("v_cache", record.store.v)):
                if call[cache] is not None:
                    _check_slots(cache, layout, record.store, call, where)
    return carrier.clone()


def _after(name: str, first: Tensor, second: Tensor, *args: Any) -> tuple[Tensor, Tensor] | None:
    *given, text, where = args
    if where not in _compared and not _capturing(first):
        _compared.add(where)
        record = READERS[name](text.replace("'", '"'))
        with torch.no_grad():
            call = _named(name, given)
            if isinstance(record, AddNorm):
                _compare_sums(record, (first, second), call, where)
            else:
                _compare_rows(record, (first, second), call, where)
    return None if name.endswith("_") else (first.clone(), second.clone())


def _named(name: str, given: list[Any]) -> dict[str, Any]:
    """The op's arguments but the record, by their names."""
    names = (argument.split()[-1] for argument in _arguments(name).split(", "))
    return dict(zip(names, given, strict=False))


def _capturing(x: Tensor) -> bool:
    """Nothing can be told from inside a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


# --- before the op ---------------------------------------------------------------------------


def _check_nan(call: dict[str, Any], where: str) -> None:
    for name, x in call.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or name.endswith("_cache"):
            continue
        if (where, name) in _told or not bool((there := x.isnan()).any()):
            continue
        _told.add((where, name))
        log.warning(
            "fxfuse: %s has NaN, %d of %d numbers, the first at %s; at %s. Look at what computes "
            "it; this is told once a site",
            name, int(there.sum()), x.numel(), there.nonzero()[0].tolist(), where,
        )  # fmt: skip


def _check_positions(call: dict[str, Any], where: str) -> None:
    rows = call["cos"].shape[1]
    bad = (call["positions"] < -rows) | (call["positions"] >= rows)
    _refuse_first("positions", call["positions"], bad, (-rows, rows - 1), "rows of cos", where)


def _check_slots(name: str, layout: Layout, store: Store, call: dict[str, Any], where: str) -> None:
    """Each index that the layout makes of slots and offsets lies in its axis of the cache."""
    at, cache = (call["slots"], call["offsets"]), call[name]
    skipped = is_skipped(store, layout, at)
    for digit, (operand, by, of) in enumerate(layout.index):
        size = cache.shape[layout.axes.index(str(digit))]
        index, low = index_of(at[operand], by, of), -size if store.negative == "wrap" else 0
        bad = (index < low) | (index >= size)
        if skipped is not None:
            bad &= ~skipped
        what = f"axis {digit} of {name} {tuple(cache.shape)}"
        what += ", those below 0 are skipped" if store.negative == "skip" else ""
        what += f", {store.skipped} is skipped" if store.skipped is not None else ""
        allowed = (low * by, size * by - 1)
        _refuse_first(("slots", "offsets")[operand], at[operand], bad, allowed, what, where)


def _refuse_first(
    name: str, x: Tensor, bad: Tensor, allowed: tuple[int, int], what: str, where: str
) -> None:
    if not bool(bad.any()):
        return
    place = bad.nonzero()[0].tolist()
    low, high = allowed
    raise IndexError(
        f"fxfuse: {name}{place} is {int(x[tuple(place)])}, out of bounds: allowed are {low} to "
        f"{high} ({what}); at {where}. Look at what computes {name}; nothing was written"
    )


# --- behind the op ---------------------------------------------------------------------------


def _compare_rows(
    record: Record, results: tuple[Tensor, Tensor], call: dict[str, Any], where: str
) -> None:
    """q, k and stored rows against the reference in float64."""
    wide = {n: _widened(x) for n, x in call.items() if not n.endswith("_cache")}
    exact = reference.in_float64(record)
    scratch: dict[str, Tensor] = {}
    if record.store is None:
        rows = reference.norm_rope(**wide, record=exact)
    else:
        scratch, exact = _scratch(exact, call)
        at = _places(record.store.k, call)
        tokens = torch.arange(at[0].numel(), device=at[0].device).view(at[0].shape)
        wide |= {"slots": tokens, "offsets": None} | {n: None for n in ("k_cache", "v_cache")}
        rows = reference.norm_rope_store_(**wide | scratch, record=exact)
    for name, got, want in zip("qk", results, rows, strict=True):
        if want is not None and got.dim() == 4:
            _tell(name, got.flatten(0, 2), want.flatten(0, 2), got.dtype, where)
    for name, expected in scratch.items():
        _compare_stored(name, record, call, expected, where)


def _scratch(record: Record, call: dict[str, Any]) -> tuple[dict[str, Tensor], Record]:
    """A cache of float64 for the rows alone, one slot a token, for each cache; and their record."""
    store, found = record.store, {}
    assert store is not None
    layouts = {}
    for name, layout in (("k", store.k), ("v", store.v)):
        cache, layouts[name] = call[f"{name}_cache"], layout
        if cache is None:
            continue
        count = _places(layout, call)[0].numel()
        kept = [i for i, letter in enumerate(layout.axes) if letter not in "12"]
        axes = "".join(layout.axes[i] for i in kept)
        shape = [count if layout.axes[i] == "0" else cache.shape[i] for i in kept]
        found[f"{name}_cache"] = cache.new_zeros(shape, dtype=torch.float64)
        layouts[name] = dataclasses.replace(layout, axes=axes, index=((0, 1, 0),))
    store = dataclasses.replace(store, negative="invalid", skipped=None, **layouts)
    return found, dataclasses.replace(record, store=store)


def _places(layout: Layout, call: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Slots and offsets, [B, T], or [1, T] where all batch rows of a cache share them."""
    b, t = call["q"].shape[:2]
    rows = 1 if "b" in layout.axes else b
    slots, offsets = call["slots"][:rows].expand(rows, t), call["offsets"]
    return slots, None if offsets is None else offsets[:rows].expand(rows, t)


def _compare_stored(
    name: str, record: Record, call: dict[str, Any], expected: Tensor, where: str
) -> None:
    """The rows that the op wrote, copied out of the cache, against the reference's."""
    store, cache = record.store, call[name]
    assert store is not None
    layout = store.k if name == "k_cache" else store.v
    at, axes = _places(layout, call), layout.axes
    dims = [axes.index(str(i)) for i in range(len(layout.index))]
    indices, place = [], torch.zeros_like(at[0]).flatten().long()
    for dim, how in zip(dims, layout.index, strict=True):
        index = index_of(at[how[0]], *how[1:]).flatten()
        index = torch.where(index < 0, index + cache.shape[dim], index)
        index = index.clamp(0, cache.shape[dim] - 1)
        indices.append(index)
        place = place * cache.shape[dim] + index
    skipped = is_skipped(store, layout, at)
    if skipped is not None:
        place = torch.where(skipped.flatten(), -1, place)
    written = _last(place) & (place >= 0)
    dtype = getattr(torch, layout.cast.dtype) if layout.cast.dtype else cache.dtype
    numbers = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
    others = [i for i in range(len(axes)) if i not in dims]
    rows = numbers.permute(*dims, *others)[tuple(indices)][written]
    rows = rows.view(dtype) if cache.dtype.itemsize == 1 else rows
    first = "".join(a for a in axes if a not in "12").index("0")
    _tell(name, rows.flatten(1), expected.movedim(first, 0)[written].flatten(1), dtype, where)


def _last(place: Tensor) -> Tensor:
    """Whether no later row has the same place."""
    if not place.numel():
        return place.bool()
    order = torch.arange(place.numel(), device=place.device)
    _, which = torch.unique(place, return_inverse=True)
    last = torch.zeros_like(which).scatter_reduce(0, which, order, "amax", include_self=False)
    return last[which] == order


def _compare_sums(
    record: AddNorm, results: tuple[Tensor, Tensor], call: dict[str, Any], where: str
) -> None:
    """Sum and normed rows; each addition may round the sum by as much as its largest addend."""
    wide = {n: _widened(x) for n, x in call.items()}
    total, y = reference.add_rms_norm(**wide, record=dataclasses.replace(record, dtype="float64"))
    addends = [wide[n] for n in ("x", "residual", "second") if wide[n] is not None]
    most = sum(a.abs() for a in addends).amax(-1, keepdim=True)
    eps = record.addends * torch.finfo(call["x"].dtype).eps
    for name, got, want in zip(("sum", "result"), results, (total, y), strict=True):
        if got.dim() == want.dim() and got.shape == want.shape:
            lost = most / total.abs().amax(-1, keepdim=True).clamp_min(1e-30)
            more = eps * lost * want.abs().amax(-1, keepdim=True)
            _tell(name, got, want, got.dtype, where, more)


def _widened(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _tell(
    name: str, got: Tensor, want: Tensor, dtype: torch.dtype, where: str, more: Any = 0.0
) -> None:
    """Warn where rows differ by more than one rounding of the dtype, and float32's inside."""
    if not got.numel():
        return
    info, got = torch.finfo(dtype), got.double()
    work = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    one = info.eps * want.abs() + info.smallest_normal * info.eps
    allowed = one + INSIDE * work.eps * want.abs().amax(-1, keepdim=True) + more
    # Of numbers beyond the dtype's largest, and of NaN, the graph's own code differs too.
    known = want.abs() <= info.max
    difference = torch.where(known, (got - want).abs(), 0.0)
    bad = known & ~(difference <= allowed)
    if not bool(bad.any()):
        return
    excess = torch.where(bad, (difference - allowed).nan_to_num(float("inf")), -1.0)
    place = int(excess.argmax())
    log.warning(
        "fxfuse: %s differs from the reference, %d of %d numbers; the worst is %g, wanted %g "
        "(one rounding of %s is %g); at %s. Please report this; compile with fxfuse.Backend("
        "disable=('attention',)) until it is mended",
        name, int(bad.sum()), bad.numel(), float(got.flatten()[place]),
        float(want.flatten()[place]), dtype, float(one.flatten()[place]), where,
    )  # fmt: skip


# --- the ops ---------------------------------------------------------------------------------


@functools.cache
def _arguments(name: str) -> str:
    """The op's arguments as its schema has them, without what it mutates."""
    schema = SCHEMAS[name]
    inside = schema[schema.index("(") + 1 : schema.rindex(") ->")]
    return inside.replace("(a!)", "").replace("(b!)", "")


def _define(name: str, schema: str, run: Any, fake: Any) -> None:
    tags = [torch.Tag.pt2_compliant_tag]
    # What they tell cannot be told from a CUDA graph.
    tags += [t for t in (getattr(torch.Tag, "cudagraph_unsafe", None),) if t is not None]
    library.define(f"{name}({schema}", tags=tuple(tags))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxfuse_debug::{name}", fake, lib=library)


def _enter(name: str) -> None:
    """Both ops of an op, with gradients that pass through."""
    arguments, carrier = f"{_arguments(name)}, str where)", CARRIERS[name]
    count, stores = len(arguments.split(", ")), name.endswith("_")
    before, after = f"before_{name}", f"after_{name}"
    _define(
        before,
        f"{arguments} -> Tensor",
        functools.partial(_before, name),
        lambda *args: torch.empty_like(args[carrier]),
    )
    # Marked as writing, so that it stands before whatever reads the cache next.
    marked = arguments.replace("Tensor k_cache", "Tensor(a!) k_cache")
    returned = "()" if stores else "(Tensor, Tensor)"
    _define(
        after,
        f"Tensor first_result, Tensor second_result, {marked} -> {returned}",
        functools.partial(_after, name),
        lambda *args: None if stores else tuple(map(torch.empty_like, args[:2])),
    )
    if stores:
        return
    rest = (None,) * (count - carrier - 1)
    for op, backward in (
        (before, lambda ctx, grad: (*(None,) * carrier, grad, *rest)),
        (after, lambda ctx, first, second: (first, second, *(None,) * count)),
    ):
        torch.library.register_autograd(f"fxfuse_debug::{op}", backward, lib=library)


for _name in CARRIERS:
    _enter(_name)
