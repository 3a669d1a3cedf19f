"""Paged, split and 8-bit caches, as serving engines write them in plain PyTorch.

In: a write of k's and v's rows at slots. Out: caches as eager leaves them, canaries kept, and the
store in the fused op with its layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.test_flat import ROPE, Rotated, check
from tests.toys import D, G

H, T = 4, 5
# Pages, tokens a page, width of the split.
N, P, X = 3, 8, 4
SLOTS = torch.tensor([17, 3, 8, 0, 22])
LAST = torch.tensor([-1, 3, -9, 0, 22])
Write = Callable[[Tensor, Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def nhd(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, slots % P] = rows


def hnd(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[torch.div(slots, P, rounding_mode="floor"), :, torch.remainder(slots, P)] = rows


def split(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """[N, G, D / x, P, x]"""
    cache[slots // P, :, :, slots % P] = rows.view(*rows.shape[:-1], D // X, X)


def transposed(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """[N, G, D, P]"""
    cache[slots // P, :, :, slots % P] = rows


def shuffled(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """[N, G, P / x, D, x]"""
    offset = slots % P
    cache[slots // P, :, offset // X, :, offset % X] = rows


def flat_view(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.view(-1, G, D)[slots] = rows


def int32(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    small = slots.int()
    cache[(small // P).long(), (small % P).long()] = rows


PAGES = (N, P, G, D)
# How k and v are written, shapes of the caches, and their axes.
LAYOUTS: dict[str, tuple[Write, Write, tuple[int, ...], tuple[int, ...], str, str]] = {
    "nhd": (nhd, nhd, PAGES, PAGES, "01hd", "01hd"),
    "hnd": (hnd, hnd, (N, G, P, D), (N, G, P, D), "0h1d", "0h1d"),
    "split": (split, transposed, (N, G, D // X, P, X), (N, G, D, P), "0hd1e", "0hd1"),
    "shuffled": (split, shuffled, (N, G, D // X, P, X), (N, G, P // X, D, X), "0hd1e", "0h1d2"),
    "flat view": (flat_view, flat_view, PAGES, PAGES, "0hd", "0hd"),
    "int32": (int32, int32, PAGES, PAGES, "01hd", "01hd"),
}


def each(write_k: Write, write_v: Write) -> Any:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        write_k(ks, slots, k)
        write_v(vs, slots, v)
        return q

    return finish


def stored(
    finish: Any, shapes: Any, slots: Tensor, *more: Tensor, dtype: Any = torch.float32,
    compiler: str = "eager",
) -> Any:  # fmt: skip
    memory = [torch.full(s, 3.0 + i).to(dtype) for i, s in enumerate(shapes)]
    rows = [(T, n, D) for n in (H, G, G)]
    report = check(Rotated(finish), rows, torch.arange(T), *memory, slots, *more, compiler=compiler)
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k,v)") and not report.refused, report
    return fused.record.store


@pytest.mark.parametrize(
    ("compiler", "slots"),
    [
        pytest.param("eager", SLOTS, marks=pytest.mark.null, id="eager"),
        pytest.param("eager", LAST, marks=pytest.mark.null, id="from the end"),
        pytest.param("inductor", LAST, marks=pytest.mark.cpu, id="inductor"),
    ],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_stored_to(name: str, slots: Tensor, compiler: str) -> None:
    write_k, write_v, k_shape, v_shape, k_axes, v_axes = LAYOUTS[name]
    store = stored(each(write_k, write_v), (k_shape, v_shape), slots, compiler=compiler)
    assert (store.k.axes, store.v.axes) == (k_axes, v_axes)
    assert all(operand == 0 for x in (store.k, store.v) for operand, *_ in x.index)


@pytest.mark.null
@pytest.mark.parametrize("name", ["nhd", "shuffled"])
def test_blocks_and_offsets_are_given(name: str) -> None:
    _, _, k_shape, v_shape, *_ = LAYOUTS[name]

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, blocks: Tensor, at: Tensor):
        if name == "nhd":
            ks[blocks, at] = k
            vs[blocks, at] = v
        else:
            ks[blocks, :, :, at] = k.view(T, G, D // X, X)
            vs[blocks, :, at // X, :, at % X] = v
        return q

    store = stored(finish, (k_shape, v_shape), SLOTS // P, SLOTS % P)
    assert [operand for operand, *_ in store.k.index] == [0, 1]


@pytest.mark.null
def test_a_batch_of_single_tokens_is_stored_by_a_slot_each() -> None:
    """Decode as serving engines batch it: [B, 1, heads, D] and slots [B]."""

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        nhd(ks, slots, k.view(-1, G, D))
        nhd(vs, slots, v.squeeze(1))
        return q

    memory = [torch.full(PAGES, 3.0), torch.full(PAGES, 4.0), SLOTS]
    rows = [(T, 1, n, D) for n in (H, G, G)]
    report = check(Rotated(finish), rows, torch.arange(T)[:, None], *memory)
    assert [f.stages for f in report.fused] == [(ROPE, "store(k,v)")]


@pytest.mark.null
def test_rows_of_a_batch_are_stored_as_one_row_of_tokens() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks[slots] = k.flatten(0, 1)
        vs[slots] = v.flatten(0, 1)
        return q

    memory = [torch.full((24, G, D), 3.0), torch.full((24, G, D), 4.0)]
    rows = [(2, T, n, D) for n in (H, G, G)]
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(0))[: 2 * T]
    report = check(Rotated(finish), rows, torch.arange(T).expand(2, -1), *memory, slots)
    assert [f.stages for f in report.fused] == [(ROPE, "store(k,v)")]


# --- 8-bit caches --------------------------------------------------------------------------------

FORMATS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
Scales = dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]]
# How rows are scaled, the scale's shape, and what the record says.
SCALES: Scales = {
    "none": (lambda x, s: x, (), {}),
    "divided": (lambda x, s: x / s, (), {"scale": "divide"}),
    "one element": (lambda x, s: x / s, (1,), {"scale": "divide"}),
    "multiplied": (lambda x, s: x * s, (1,), {"scale": "multiply"}),
    "by head": (lambda x, s: x / s.view(1, -1, 1), (G,), {"scale": "divide"}),
    "by token": (lambda x, s: s * x, (T, 1, 1), {"scale": "multiply"}),
    "clamped": (
        lambda x, s: (x / s).clamp(-100.0, 100.0), (1,), {"scale": "divide", "limit": 100.0}
    ),
    "a number": (lambda x, s: x / 0.5, (), {"factor": 2.0}),
    "cast before": (lambda x, s: x.float() / s.float(), (1,), {"scale": "divide"}),
}  # fmt: skip


def eight_bits(dtype: torch.dtype, scale: Any, as_bits: bool) -> Any:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, *by: Tensor
    ) -> Any:
        for cache, rows, s in zip((ks, vs), (k, v), by, strict=True):
            cast = scale(rows, s).to(dtype)
            cache[slots // P, slots % P] = cast.view(torch.uint8) if as_bits else cast
        return q

    return finish


# Every scale and format without a compiler; through Inductor each scale, the formats in turn, most
# of them with the long tests.
CASTS = [
    pytest.param(dtype, name, "eager", bits, marks=pytest.mark.null)
    for dtype in FORMATS
    for name in SCALES
    for bits in (False, True)
] + [
    pytest.param(FORMATS[i % 3], name, "inductor", i % 2 == 0, marks=marks)
    for i, name in enumerate(SCALES)
    for marks in [[pytest.mark.cpu] if i < 3 else [pytest.mark.cpu, pytest.mark.long]]
]


@pytest.mark.parametrize(("dtype", "name", "compiler", "as_bits"), CASTS)
def test_rows_are_cast(dtype: str, name: str, compiler: str, as_bits: bool) -> None:
    scale, shape, said = SCALES[name]
    format_ = getattr(torch, dtype)
    memory = torch.uint8 if as_bits else format_
    # Far past the largest number too: what torch makes of that is kept.
    by = [torch.full(shape, s) * (1 + torch.rand(shape)) for s in (0.02, 0.001)]
    store = stored(
        eight_bits(format_, scale, as_bits), (PAGES, PAGES), SLOTS, *by, dtype=memory,
        compiler=compiler,
    )  # fmt: skip
    # A number that multiplies k is the stream's own scale.
    for layout in (store.k, store.v) if "factor" not in said else (store.v,):
        for field, value in {"dtype": dtype, **said}.items():
            assert getattr(layout.cast, field) == value


SCALED_ROWS = {
    "head": ((G, 1), ["store(k,v)"]),
    "row": ((2, T, G, 1), []),
    "batch row": ((2, 1, 1, 1), []),
}


@pytest.mark.null
@pytest.mark.parametrize("by", SCALED_ROWS)
def test_rows_of_a_batch_are_scaled_before_they_are_one_row_of_tokens(by: str) -> None:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, s: Tensor
    ) -> Any:
        for cache, rows in ((ks, k), (vs, v)):
            cache[slots] = (rows / s).to(torch.float8_e5m2).flatten(0, 1)
        return q

    shape, stages = SCALED_ROWS[by]
    memory = [torch.full((24, G, D), 3.0).to(torch.float8_e5m2) for _ in "kv"]
    rows = [(2, T, n, D) for n in (H, G, G)]
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(0))[: 2 * T]
    scale = 0.1 + torch.rand(shape)
    report = check(Rotated(finish), rows, torch.arange(T).expand(2, -1), *memory, slots, scale)
    assert [s for f in report.fused for s in f.stages if s.startswith("store")] == stages
    assert stages or any("regrouped before they are stored" in r.reason for r in report.refused)


@pytest.mark.null
@pytest.mark.parametrize(
    ("cast", "reason"),
    [
        (lambda x, s: (x.clamp(-1.0, 1.0) / s).to(torch.float8_e5m2), "another limit before"),
        (lambda x, s: x.clamp(0.0, 1.0).to(torch.float8_e5m2), "clamped to 0.0, 1.0"),
        (lambda x, s: (x / s / s).to(torch.float8_e5m2), ""),
        (lambda x, s: (x / s.expand(D)).to(torch.float8_e5m2), ""),
    ],
)
def test_a_cast_that_is_none_of_ours_stays_the_models(cast: Any, reason: str) -> None:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, s: Tensor
    ) -> Any:
        ks[slots // P, slots % P] = cast(k, s)
        vs[slots // P, slots % P] = cast(v, s)
        return q

    memory = [torch.full(PAGES, 3.0).to(torch.float8_e5m2) for _ in range(2)]
    rows = [(T, n, D) for n in (H, G, G)]
    report = check(Rotated(finish), rows, torch.arange(T), *memory, SLOTS, torch.tensor([0.5]))
    assert [f.stages for f in report.fused] == [(ROPE,)]
    assert any(reason in r.reason for r in report.refused) or not reason, report


@pytest.mark.null
def test_rows_that_others_read_after_the_cast_stay_real() -> None:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, s: Tensor
    ) -> Any:
        cast = (k / s).to(torch.float8_e4m3fn)
        ks[slots // P, slots % P] = cast
        vs[slots // P, slots % P] = (v / s).to(torch.float8_e4m3fn)
        return q, cast.float(), k

    memory = [torch.full(PAGES, 3.0).to(torch.float8_e4m3fn) for _ in range(2)]
    rows = [(T, n, D) for n in (H, G, G)]
    report = check(Rotated(finish), rows, torch.arange(T), *memory, SLOTS, torch.tensor([0.5]))
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k,v)") and fused.record.k.keep


@pytest.mark.null
def test_rows_written_between_cast_and_store() -> None:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, s: Tensor
    ) -> Any:
        cast = (k / s).to(torch.float8_e4m3fn)
        cast[1].zero_()
        ks[slots // P, slots % P] = cast
        other = (v / s).to(torch.float8_e4m3fn)
        v.zero_()
        vs[slots // P, slots % P] = other
        return q

    memory = [torch.full(PAGES, 3.0).to(torch.float8_e4m3fn) for _ in range(2)]
    rows = [(T, n, D) for n in (H, G, G)]
    check(Rotated(finish), rows, torch.arange(T), *memory, SLOTS, torch.tensor([0.5]))
    assert fxfuse.last_report().fused
