"""QK-norm and RoPE as diffusion models and their serving engines spell it: fused, and as near to
float64 as eager is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.diffusion_toys import (
    CIRCLE,
    DIFFERING,
    HALVES,
    PAIRS,
    ROTATIONS,
    TEXT,
    Alone,
    D,
    EachTurned,
    GridTurned,
    H,
    JoinedNormed,
    JoinedTurned,
    Packed,
    Rotation,
    Segment,
    Write,
    check,
    draw,
    places,
)

pytestmark = pytest.mark.null

WHOLE = ("rms_norm", "rope(by position)")
B, T = 2, 16


def whole(rotation: Rotation) -> tuple[str, ...]:
    """The stages of a chain that is fused; rows of a complex table are taken by the graph."""
    return WHOLE if rotation is not CIRCLE else ("rms_norm", "rope")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def sites(report: fxfuse.Report) -> list[tuple[str, ...]]:
    """The stages of each site; nothing that is reported may be a refusal."""
    assert not report.refused and not report.notes
    return [site.stages for site in report.fused]


def qkv(tokens: int = T, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(B, tokens, H, D, seed=i, dtype=dtype) for i in range(3)]


def segments(tokens: int = T) -> list[Tensor]:
    """Packed text and image, and the positions of each."""
    lengths = (TEXT, tokens)
    packed = [draw(B, n, 3 * H * D, seed=n) for n in lengths]
    return [*packed, *(places(B, n, seed=n) for n in lengths)]


# --- one segment -------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", [D, D // 2])
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_each_rotation_and_table(rotation: Rotation, rotary: int) -> None:
    report = check(Alone(Segment(rotation, rotary)), *qkv(), places(B, T))
    assert sites(report) == [whole(rotation)]
    turn = report.fused[0].record.q.rotation
    assert turn is not None and 2 * turn.pairs == rotary


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 64, 65])
def test_every_number_of_tokens_and_both_kinds_of_positions(
    tokens: int, dtype: torch.dtype
) -> None:
    at = places(B, tokens, dtype=dtype)
    assert sites(check(Alone(Segment(PAIRS)), *qkv(tokens), at)) == [WHOLE]


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotation", [PAIRS, HALVES, DIFFERING], ids=str)
def test_tables_and_rows_of_both_dtypes(
    rotation: Rotation, dtype: torch.dtype, table: torch.dtype
) -> None:
    toy = Alone(Segment(rotation, dtype=dtype, table_dtype=table))
    assert sites(check(toy, *qkv(dtype=dtype), places(B, T))) == [WHOLE]


def test_views_of_a_packed_projection() -> None:
    toy = Packed(Segment(PAIRS, D // 2))
    packed = draw(B, T, 3 * H * D)
    assert sites(check(toy, packed, places(B, T))) == [WHOLE]
    torch._dynamo.reset()
    padded = draw(B, T, 3 * H * D + 8)[..., 8:]
    assert sites(check(toy, padded, places(B, T))) == [WHOLE]


def test_a_table_that_differs_inside_its_pairs_is_read_at_each_channel() -> None:
    report = check(Alone(Segment(DIFFERING)), *qkv(), places(B, T))
    (fused,) = report.fused
    for table in (fused.record.q.rotation.cos, fused.record.q.rotation.sin):
        assert table.second == table.first + 1 and table.step == 2


# --- written in place --------------------------------------------------------------------------


def copied(x: Tensor, y: Tensor) -> Any:
    return x.copy_(y)


def set_whole(x: Tensor, y: Tensor) -> None:
    x[...] = y


def set_rows(x: Tensor, y: Tensor) -> None:
    x[:] = y


def copied_to_a_view(x: Tensor, y: Tensor) -> None:
    x.view(-1, H * D).copy_(y.reshape(-1, H * D))


WRITES = [copied, set_whole, set_rows, copied_to_a_view]


@pytest.mark.parametrize("rotation", [PAIRS, HALVES, CIRCLE], ids=str)
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_written_in_place(write: Write, rotation: Rotation) -> None:
    assert sites(check(Alone(Segment(rotation), write), *qkv(), places(B, T))) == [whole(rotation)]


@pytest.mark.parametrize("write", WRITES[:2], ids=lambda f: f.__name__)
def test_a_norm_that_is_written_in_place_stays_the_models(write: Write) -> None:
    """What is turned is read from memory again: two writes, two roundings."""
    report = check(Alone(Segment(PAIRS), write, twice=True), *qkv(), places(B, T))
    assert sites(report) == [WHOLE[1:]] and len(report.left) == 2


def test_views_of_a_packed_projection_are_written_in_place() -> None:
    toy = Packed(Segment(HALVES), copied)
    assert sites(check(toy, draw(B, T, 3 * H * D), places(B, T))) == [WHOLE]


# --- text and image ----------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", [PAIRS, HALVES, CIRCLE], ids=str)
@pytest.mark.parametrize("tokens", [16, 17])
def test_segments_that_are_turned_before_they_are_joined(rotation: Rotation, tokens: int) -> None:
    toy = EachTurned(Segment(rotation, seed=1), Segment(rotation, seed=2))
    assert sites(check(toy, *segments(tokens))) == [whole(rotation)] * 2


@pytest.mark.parametrize("rotation", [PAIRS, HALVES, CIRCLE], ids=str)
@pytest.mark.parametrize("tokens", [16, 17])
def test_segments_that_are_joined_before_they_are_turned(rotation: Rotation, tokens: int) -> None:
    """The joint is the rotation's source: what came before it is the compiler's."""
    toy = JoinedTurned(Segment(rotation, seed=1), Segment(rotation, seed=2))
    report = check(toy, *segments(tokens))
    assert sites(report) == [whole(rotation)[1:]]


@pytest.mark.parametrize("at", [0, TEXT])
@pytest.mark.parametrize("rotation", [PAIRS, HALVES, DIFFERING], ids=str)
def test_joined_rows_of_which_a_part_turns_by_a_grid(rotation: Rotation, at: int) -> None:
    """Rows that three axes walk together, in the midst of an axis of the joined ones."""
    toy = GridTurned(Segment(rotation), (2, 2, 4), at)
    assert sites(check(toy, *segments(16)[:2])) == [("rms_norm", "rope")]


@pytest.mark.parametrize("rotation", [PAIRS, HALVES, CIRCLE], ids=str)
def test_segments_that_are_joined_before_their_norm(rotation: Rotation) -> None:
    assert sites(check(JoinedNormed(Segment(rotation)), *segments())) == [whole(rotation)]


def test_segments_of_unlike_rotations() -> None:
    toy = EachTurned(Segment(PAIRS, D // 2, seed=1), Segment(HALVES, seed=2))
    report = check(toy, *segments())
    assert sites(report) == [WHOLE, WHOLE]
    assert {2 * f.record.q.rotation.pairs for f in report.fused} == {D // 2, D}


# --- through Inductor --------------------------------------------------------------------------

COMPILED = {
    "alone": (Alone(Segment(PAIRS)), [*qkv(17), places(B, 17)]),
    "in place": (Alone(Segment(HALVES), copied), [*qkv(), places(B, T)]),
    "complex": (Packed(Segment(CIRCLE)), [draw(B, T, 3 * H * D), places(B, T)]),
    "differing": (Alone(Segment(DIFFERING)), [*qkv(), places(B, T).int()]),
    "two segments": (EachTurned(Segment(PAIRS, seed=1), Segment(PAIRS, seed=2)), segments()),
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", COMPILED)
def test_inductor_compiles_it(name: str) -> None:
    toy, inputs = COMPILED[name]
    stages = whole(CIRCLE) if name == "complex" else WHOLE
    assert set(sites(check(toy, *inputs, compiler="inductor"))) == {stages}
