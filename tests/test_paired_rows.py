"""Rotated pairs that are cast to 8 bits, or read otherwise, before they are flattened to channels.

In: k [T, G, D / 2, 2] or [T, G, 2, D / 2] as the rotation stacks it, and what is done with it. Out:
caches as eager leaves them, one rotation of all channels of a head, and its store, or the reason
why that stays the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.test_flat import ROPE, Rotated, check
from tests.test_layouts import PAGES, SLOTS, H, N, P, T, X
from tests.toys import D, G

F8 = torch.float8_e4m3fn
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
Finish = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


# --- pairs: x [.., D], cos and sin [.., D / 2] -> [.., D / 2, 2] or [.., 2, D / 2] --------------


def adjacent(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -2)


def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * torch.complex(cos, sin))


def matrices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turns = torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))
    x = x.unflatten(-1, (-1, 1, 2))
    return turns[..., 0] * x[..., 0] + turns[..., 1] * x[..., 1]


TURNS = (adjacent, halves, complex_numbers, matrices)


class Paired(Rotated):
    """k reaches `finish` as the pairs that its rotation stacks."""

    def __init__(self, finish: Finish, turn: Turn = adjacent) -> None:
        super().__init__(finish)
        self.turn = turn

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *memory: Tensor) -> Any:
        cos, sin = (x[..., : D // 2] for x in self.table[positions].unsqueeze(-2).chunk(2, -1))
        q = self.turn(q, cos, sin).flatten(-2)
        return self.finish(q, self.turn(k, cos, sin), v, *memory)


def stored(
    finish: Finish, *by: Tensor, turn: Turn = adjacent, shape: tuple[int, ...] = PAGES,
    dtype: torch.dtype = F8, compiler: str = "eager",
) -> fxfuse.Report:  # fmt: skip
    """The report of k and v stored by `finish` in two caches with canaries."""
    memory = [torch.full(shape, 3.0 + i).to(dtype) for i in range(2)]
    rows = [(T, n, D) for n in (H, G, G)]
    given = (torch.arange(T), *memory, SLOTS, *by)
    return check(Paired(finish, turn), rows, *given, compiler=compiler)


def put(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, slots % P] = rows


def each(cast: Callable[..., Tensor], write: Any = put) -> Finish:
    """k and v cast alike, k flattened behind it."""

    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, *by: Tensor
    ) -> Any:
        write(ks, slots, cast(k, *by).flatten(-2))
        write(vs, slots, cast(v.unsqueeze(-1), *by).flatten(-2))
        return q

    return finish


def to_8_bits(x: Tensor, *_: Tensor) -> Tensor:
    return x.to(F8)


COMPILERS = pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)


@COMPILERS
@pytest.mark.parametrize("turn", TURNS, ids=lambda f: f.__name__)
def test_pairs_that_are_cast_before_they_are_flattened_are_stored(
    turn: Turn, compiler: str
) -> None:
    report = stored(each(to_8_bits), turn=turn, compiler=compiler)
    (fused,) = report.fused
    assert fused.stages[-1] == "store(k,v)" and not report.refused
    assert fused.record.k.channels == D and not fused.record.k.keep
    assert fused.record.store.k.cast.dtype == "float8_e4m3fn"


# How pairs are cast, the scale's shape, and what the record says.
CASTS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "divided": (lambda x, s: (x / s).to(F8), (1,), {"scale": "divide"}),
    "clamped": (
        lambda x, s: (x / s).clamp(-448, 448).to(F8), (), {"scale": "divide", "limit": 448.0}
    ),
    "by head": (lambda x, s: (x * s).clamp(-9, 9).to(F8), (G, 1, 1), {"scale": "multiply"}),
    "by token": (lambda x, s: (x / s).to(F8), (T, 1, 1, 1), {"scale": "divide"}),
    "by row": (lambda x, s: (x / s).to(F8), (T, G, 1, 1), {"scale": "divide"}),
    "copied": (lambda x, s: (x / s).to(F8).clone(), (1,), {"scale": "divide"}),
    "turned": (
        lambda x, s: (x.transpose(0, 1) / s).to(F8).transpose(0, 1), (G, 1, 1, 1),
        {"scale": "divide"},
    ),
}  # fmt: skip


@pytest.mark.null
@pytest.mark.parametrize("name", CASTS)
def test_pairs_are_scaled_too(name: str) -> None:
    cast, shape, said = CASTS[name]
    report = stored(each(cast), 0.01 + torch.rand(shape) / 10)
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k,v)") and not report.refused
    for layout in (fused.record.store.k, fused.record.store.v):
        assert all(getattr(layout.cast, field) == value for field, value in said.items())


def flat(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots] = rows


def heads_first(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[:, :, slots] = rows.transpose(0, 1).unsqueeze(0)


def split(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, :, :, slots % P] = rows.view(*rows.shape[:-1], D // X, X)


def bits(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.index_copy_(0, slots, rows.view(torch.uint8))


FLAT = (N * P, G, D)
WRITES: dict[Any, tuple[int, ...]] = {
    flat: FLAT,
    heads_first: (1, G, N * P, D),
    split: (N, G, D // X, P, X),
}


@pytest.mark.null
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_pairs_are_stored_in_any_layout(write: Any) -> None:
    (fused,) = stored(each(to_8_bits, write), shape=WRITES[write]).fused
    assert fused.stages == (ROPE, "store(k,v)") and fused.record.k.channels == D


@pytest.mark.null
def test_pairs_are_stored_as_bits() -> None:
    (fused,) = stored(each(to_8_bits, bits), shape=FLAT, dtype=torch.uint8).fused
    assert fused.stages == (ROPE, "store(k,v)") and fused.record.k.channels == D


# --- pairs that others read ----------------------------------------------------------------------


@COMPILERS
def test_pairs_that_are_read_too_come_out_as_pairs(compiler: str) -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        each(to_8_bits)(q, k, v, ks, vs, slots)
        return q, k, k[..., 1] * 2

    (fused,) = stored(finish, compiler=compiler).fused
    assert fused.stages == (ROPE, "store(k,v)") and fused.record.k.keep


@pytest.mark.null
@pytest.mark.parametrize("turn", TURNS, ids=lambda f: f.__name__)
def test_pairs_that_are_flattened_for_attention_and_cast_for_the_cache_are_one_stream(
    turn: Turn,
) -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        each(to_8_bits)(q, k, v, ks, vs, slots)
        return q @ k.flatten(-2).repeat_interleave(H // G, 1).transpose(-1, -2)

    (fused,) = stored(finish, turn=turn).fused
    assert fused.stages[-1] == "store(k,v)" and fused.record.k.keep


@pytest.mark.null
def test_pairs_that_are_cast_and_not_stored_are_channels_too() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        return q, k.to(F8).flatten(-2).float()

    (fused,) = stored(finish).fused
    assert fused.stages == (ROPE,) and fused.record.k.channels == D


# --- what stays the model's ----------------------------------------------------------------------


def by_pair(x: Tensor, s: Tensor) -> Tensor:
    return (x / s).to(F8)


def by_half(x: Tensor, s: Tensor) -> Tensor:
    return (x / s[: x.shape[-1]]).to(F8)


def asymmetric(x: Tensor, s: Tensor) -> Tensor:
    return x.clamp(-1, 2).to(F8)


def swapped(x: Tensor, s: Tensor) -> Tensor:
    return x.to(F8).view(torch.uint8).flip(-1).view(F8)


def repeated(x: Tensor, s: Tensor) -> Tensor:
    return x[..., :1].to(F8).expand(x.shape)


MISSES: dict[Any, tuple[tuple[int, ...], str]] = {
    by_pair: ((D // 2, 1), "a scale that differs by channel"),
    by_half: ((2,), "aten.div.Tensor makes of the rotated ones"),
    asymmetric: ((), "clamped to -1, 2"),
    swapped: ((), "no cast of rows"),
    repeated: ((), "that are a part of"),
}


@pytest.mark.null
@pytest.mark.parametrize("cast", MISSES, ids=lambda f: f.__name__)
def test_another_cast_of_pairs_stays_the_models_and_is_told(cast: Any) -> None:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, s: Tensor
    ) -> Any:
        put(ks, slots, cast(k, s).flatten(-2))
        put(vs, slots, v.to(F8))
        return q

    shape, reason = MISSES[cast]
    report = stored(finish, 0.5 + torch.rand(shape))
    assert all("store" not in stage for f in report.fused for stage in f.stages)
    assert [r for r in report.refused if reason in r.reason], report
    assert all(f.record.q.channels == D for f in report.fused)


@pytest.mark.null
def test_pairs_that_are_written_between_cast_and_store() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        cast = k.to(F8)
        cast[1].zero_()
        put(ks, slots, cast.flatten(-2))
        put(vs, slots, v.to(F8))
        return q

    assert stored(finish).fused


@pytest.mark.null
def test_two_heads_are_no_pair() -> None:
    """[T, 2, D] flattened to one axis behind its cast has two heads, not two of a pair."""

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks[slots] = k.flatten(-2).to(F8).flatten(-2)
        vs[slots] = v.to(F8).flatten(-2)
        return q

    report = stored(finish, shape=(N * P, G * D))
    assert report.fused[0].record.k.channels == D
    assert any("an axis for heads" in r.reason or "axes of" in r.reason for r in report.refused)


@pytest.mark.null
def test_a_lone_k_whose_rows_are_not_stored_whole_is_told() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks[slots] = k.flatten(-2)[..., : D // 2]
        return v

    report = stored(finish, shape=(N * P, G, D // 2), dtype=torch.float32)
    assert all("store" not in stage for f in report.fused for stage in f.stages)
    assert [r for r in report.refused if r.stage == "store"], report
