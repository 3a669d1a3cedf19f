"""Calls by hand: a user's operands checked and brought to the ops' axes, and the call's record.

In come tensors as serving engines hold them, with or without a batch axis; out come operands with
one, a record, or an error that names the operand, before anything is computed or written.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fxfuse.patterns.record import Cast, Layout, Norm, Pair, Pass, Rotation, Stream

FORMATS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEGATIVE = ("wrap", "skip", "invalid")
SCALES = ("divide", "multiply")


def wrong(name: str, got: Any, wanted: str, remedy: str, kind: type[Exception] = ValueError) -> Any:
    """The error of an operand."""
    got = tuple(got) if isinstance(got, torch.Size) else got
    return kind(f"fxfuse.ops: {name}: got {got}, wanted {wanted}; {remedy}")


def _refuse(*what: Any) -> NoReturn:
    raise wrong(*what)


def check_devices(operands: Mapping[str, Any]) -> None:
    """All on the device of the first."""
    tensors = {name: x for name, x in operands.items() if isinstance(x, Tensor)}
    first = next(iter(tensors))
    for name, x in tensors.items():
        if x.device != tensors[first].device:
            place = tensors[first].device
            _refuse(name, x.device, f"{first}'s device {place}", f"move it by .to('{place}')")


def check_floats(operands: Mapping[str, Tensor | None]) -> None:
    for name, x in operands.items():
        if x is not None and x.dtype not in FLOATS:
            names = ", ".join(_name(dtype) for dtype in FLOATS)
            remedy = "cast it first"
            if x.is_complex():
                remedy = "take real and imaginary part, torch.view_as_real(table).unbind(-1)"
            _refuse(name, x.dtype, f"one of {names}", remedy, TypeError)


def check_integers(operands: Mapping[str, Tensor | None]) -> None:
    for name, x in operands.items():
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            _refuse(name, x.dtype, "int32 or int64", "cast it by .long()", TypeError)


def check_choice(name: str, got: str, wanted: Sequence[str]) -> None:
    if got not in wanted:
        _refuse(name, repr(got), f"one of {', '.join(map(repr, wanted))}", "choose one of these")


def rows(name: str, x: Tensor, q: Tensor) -> Tensor:
    """[T, heads, D] or [B, T, heads, D] as the latter; tokens and batch rows are q's."""
    if q.dim() not in (3, 4):
        _refuse("q", q.shape, "[T, H, D] or [B, T, H, D]", "view the projection by heads first")
    letters = "[T, heads, D]" if q.dim() == 3 else "[B, T, heads, D]"
    if x.dim() != q.dim():
        _refuse(name, x.shape, f"{letters} as q", "view the projection by heads first")
    if x.shape[:-2] != q.shape[:-2]:
        lead = tuple(q.shape[:-2])
        _refuse(name, x.shape, f"{letters} with q's {lead} in front", "call once for each")
    return x if x.dim() == 4 else x[None]


def table(name: str, x: Tensor, q: Tensor, looked_up: bool) -> Tensor:
    """[1, N, W] where positions look it up, else [B | 1, T | 1, W]. Shapes: q [B, T, H, D]."""
    y = x[None] if x.dim() == 2 else x
    if looked_up:
        if x.dim() != 2:
            _refuse(name, x.shape, "[N, R], a row for each position", "or leave out positions")
        return y
    if y.dim() != 3 or y.shape[0] not in (1, q.shape[0]) or y.shape[1] not in (1, q.shape[1]):
        wanted = f"[T, R] or [B|1, T|1, R] with B, T = {tuple(q.shape[:2])}"
        _refuse(name, x.shape, wanted, "or hand over positions, which look up its rows")
    return y


def positions_of(x: Tensor, q: Tensor, axes: Sequence[int]) -> Tensor:
    """[B | 1, T | 1], or [axes, B | 1, T | 1]."""
    lead = 1 if axes else 0
    y = x.unsqueeze(lead) if x.dim() == lead + 1 else x
    fits = y.dim() == lead + 2
    fits = fits and y.shape[-2] in (1, q.shape[0]) and y.shape[-1] in (1, q.shape[1])
    if not fits or (axes and y.shape[0] <= max(axes)):
        several = f"{max(axes) + 1} axes, " if axes else ""
        wanted = f"[{several}T] or [{several}B|1, T|1] with B, T = {tuple(q.shape[:2])}"
        _refuse("positions", x.shape, wanted, "one position a token, and axis where pairs have")
    return y


def weight(name: str, x: Tensor | None, row: Tensor) -> None:
    """Shapes: x [D] or [heads, D] of the row's."""
    if x is not None and tuple(x.shape) not in (tuple(row.shape[-1:]), tuple(row.shape[-2:])):
        wanted = f"{tuple(row.shape[-1:])} or {tuple(row.shape[-2:])}"
        _refuse(name, x.shape, wanted, "a norm's weight is as wide as a head")


def stream(
    x: Tensor,
    turn: Rotation | None,
    width: int,
    *,
    weight: Tensor | None = None,
    normed: bool = False,
    weight_offset: float = 0.0,
    heads_first: bool = False,
    keep: bool = True,
) -> Stream:
    """What is done with rows [.., heads, D]: the norm, then their first `width` channels turned."""
    channels = int(x.shape[-1])
    offset = weight_offset if weight is not None else 0.0
    norm = Norm("head", "before", weight is not None, offset) if normed else None
    passes = (Pass(width, width, channels - width),) if width < channels else ()
    return Stream(
        channels, norm, turn, passes, dtype=_name(x.dtype), heads_first=heads_first, keep=keep
    )


def rotation(
    channels: int, rotary_dim: int | None, table_width: int, interleaved: bool, axes: Sequence[int]
) -> Rotation:
    """Pairs i, i + R / 2 (interleaved: 2i, 2i + 1); a table R wide has each channel's own number,
    one R / 2 wide each pair's.
    """
    width = channels if rotary_dim is None else rotary_dim
    if not 0 < width <= channels or width % 2:
        _refuse("rotary_dim", width, f"an even number up to {channels}", "the channels that turn")
    if table_width not in (width, width // 2):
        wanted = f"{width} or {width // 2} columns to turn {width} channels"
        _refuse("cos", f"{table_width} columns", wanted, "say by rotary_dim how many turn")
    half = width // 2
    if axes and (len(axes) != half or min(axes) < 0):
        _refuse("axes", tuple(axes), f"an axis for each of {half} pairs", "see Rotation.axes")
    pair = Pair(0, 1, 2) if interleaved else Pair(0, half, 1)
    columns = pair if table_width == width else Pair(0, 0, 1)
    return Rotation(half, pair, pair, columns, columns, (-1, 1), axes=tuple(axes))


def layout(
    name: str, axes: str, cache: Tensor, row: Tensor, offsets: bool, negative: str, cast: Cast
) -> Layout:
    """The layout of a cache whose axes have these letters; what each digit is of a slot follows
    from the cache's sizes. Shapes: row [B, T, G, D].
    """
    check_axes(name, axes)
    if cache.dim() != len(axes):
        _refuse(name, cache.shape, f"the axes {axes!r}", "say the cache's axes by layout")
    sizes = {letter: cache.shape[i] for i, letter in enumerate(axes)}
    inner = int(sizes.get("e", 1))
    for letter, wanted, has in (
        ("h", row.shape[2], sizes.get("h", 1)),
        ("d", row.shape[3], sizes["d"] * inner),
        ("b", row.shape[0], sizes.get("b", row.shape[0])),
    ):
        if has != wanted:
            what = {"h": "heads", "d": "channels", "b": "batch rows"}[letter]
            _refuse(name, cache.shape, f"{wanted} {what} in the axes {axes!r}", "see layout")
    if negative == "skip" and "b" in axes:
        _refuse("negative", "'skip'", f"'wrap' or 'invalid' for the axes {axes!r}", "see Layout")
    digits = [int(sizes[d]) for d in "12" if d in axes]
    return Layout(axes, _index(digits, offsets), cast)


def check_axes(name: str, axes: str) -> None:
    digits = "".join(sorted(x for x in axes if x.isdigit()))
    known = set(axes) <= set("bhde012") and len(set(axes)) == len(axes) and "d" in axes
    if not known or not digits or not "012".startswith(digits):
        wanted = "a letter for each axis: b, h, d, e, and 0, 01 or 012 for a slot's indices"
        _refuse(f"layout of {name}", repr(axes), wanted, "such as '0hd', '01hd', 'bh0d', '0hd1e'")


def _index(sizes: Sequence[int], offsets: bool) -> tuple[tuple[int, int, int], ...]:
    """Operand, divisor and modulus of each digit; sizes are those of the digits 1 and 2."""
    if offsets:
        if not sizes:
            _refuse("offsets", "a tensor", "None, as the cache has one index", "leave it out")
        return ((0, 1, 0), *([(1, sizes[1], 0), (1, 1, sizes[1])] if sizes[1:] else [(1, 1, 0)]))
    products = [functools.reduce(int.__mul__, sizes[i:], 1) for i in range(len(sizes) + 1)]
    return tuple((0, by, of) for by, of in zip(products, (0, *sizes), strict=True))


def cast(
    name: str, cache: Tensor, row: Tensor, scale: Tensor | None, by: str, format: str, limit: float
) -> Cast:
    """How rows become the cache's numbers: as they are, or rounded to 8 bits."""
    format = format or (_name(cache.dtype) if _name(cache.dtype) in FORMATS else "")
    if not format:
        if cache.dtype != row.dtype:
            wanted = f"the rows' {row.dtype}, or 8 bits"
            remedy = "cast the rows first; of uint8 say cache_format"
            _refuse(name, cache.dtype, wanted, remedy, TypeError)
        if scale is not None or limit:
            given = "a scale" if scale is not None else f"clamp={limit}"
            _refuse(name, given, "none, as the cache has the rows' own dtype", "leave it out")
        return Cast()
    check_choice("cache_format", format, FORMATS)
    if cache.dtype not in (torch.uint8, getattr(torch, format)):
        _refuse(name, cache.dtype, f"{format} or uint8", "that is its cache_format", TypeError)
    return Cast(format, by if scale is not None else "", 1.0, limit)  # type: ignore[arg-type]


def cache_scale(name: str, x: Tensor | None, row: Tensor, batched: bool) -> Tensor | None:
    """[B | 1, T | 1, G | 1] of one number, of [G], or of as many axes as the row's first."""
    if x is None:
        return None
    lead = row.shape[:3]
    if x.numel() == 1 and x.dim() < 3:
        return x.reshape(1, 1, 1)
    y = x[None, None] if x.dim() == 1 else x[None] if x.dim() == 2 and not batched else x
    if y.dim() != 3 or any(n not in (1, most) for n, most in zip(y.shape, lead, strict=True)):
        several = "[B|1, T|1, G|1]" if batched else "[T|1, G|1]"
        wanted = f"a number, [G] or {several} with B, T, G = {tuple(lead)}"
        _refuse(name, x.shape, wanted, "view it so")
    return y


def indices(name: str, x: Tensor, q: Tensor, one_row: bool) -> Tensor:
    """[B, T], or [1, T] for caches whose batch rows are all written at the same slots."""
    b, t = q.shape[:2]
    y = x[None] if x.dim() == 1 else x
    if y.dim() != 2 or y.shape[0] != (1 if one_row else b) or y.shape[1] != t:
        wanted = f"[T] with T = {t}" if one_row or b == 1 else f"[B, T] = {(b, t)}"
        _refuse(name, x.shape, wanted, "one slot a token; view it so, or say the layout")
    return y


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
