"""Decoding: one statement, however it is spelled, gives one record."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxfuse.patterns.record import Norm, Pair, Pass, Rotation, Stream
from tests import spellings
from tests.spellings import NORMS, ROPES, Rope, gemma, inverted, llama, rsqrt, weightless
from tests.toys import (
    Attention,
    Layer,
    Sizes,
    by_index_copy,
    check,
    compiled_like_eager,
    explain,
    hidden_states,
    stages,
)

pytestmark = pytest.mark.null

# Compiling takes half a second an example.
quick = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors],
)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def half_pairs(
    channels: int, *, tables: str = "full", signs: tuple[int, int] = (-1, 1)
) -> Rotation:
    half = channels // 2
    place = Pair(0, half, 1)
    table = place if tables == "full" else Pair(0, 0, 1)
    return Rotation(half, x=place, y=place, cos=table, sin=table, signs=signs)


def adjacent_pairs(channels: int, *, tables: str) -> Rotation:
    place = Pair(0, 1, 2)
    table = {"full": place, "narrow": Pair(0, 0, 1), "complex": Pair(0, 0, 2)}[tables]
    sin = Pair(1, 1, 2) if tables == "complex" else table
    return Rotation(channels // 2, x=place, y=place, cos=table, sin=sin, signs=(-1, 1))


def expected(rope: Rope, width: int) -> Rotation:
    """The one rotation of each group of spellings."""
    if rope in spellings.HALF_FULL:
        return half_pairs(width)
    if rope in spellings.HALF_NARROW:
        return half_pairs(width, tables="narrow")
    if rope in spellings.ADJACENT_FULL:
        return adjacent_pairs(width, tables="full")
    if rope in spellings.ADJACENT_NARROW:
        return adjacent_pairs(width, tables="narrow")
    if rope.turn is spellings.nanochat:
        return half_pairs(width, tables="narrow", signs=(1, -1))
    if rope.turn is spellings.llama4:
        return adjacent_pairs(width, tables="complex")
    assert rope.turn is spellings.deepseek
    out = Pair(0, width // 2, 1)
    return Rotation(width // 2, x=Pair(0, 1, 2), y=out, cos=out, sin=out, signs=(-1, 1))


def streams(report: Any) -> list[Stream]:
    """q and k of the one fused site."""
    assert len(report.fused) == 1 and report.refused == []
    record = report.fused[0].record
    assert record.k is not None
    return [record.q, record.k]


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_each_spelling_of_the_rotation(rope: Rope) -> None:
    report = compiled_like_eager(Attention(rope), hidden_states())
    for stream in streams(report):
        assert stream.rotation == expected(rope, 16)
        assert (stream.norm, stream.passes, stream.scale) == (None, (), 1.0)


def test_more_than_twelve_spellings_share_one_record() -> None:
    assert len(spellings.HALF_FULL) > 12
    records = set()
    for rope in spellings.HALF_FULL:
        torch._dynamo.reset()
        record = explain(Attention(rope, rsqrt), hidden_states()).fused[0].record
        # A cat makes dense rows, arithmetic keeps its operand's order: both are kept as they are.
        q, k = (dataclasses.replace(s, heads_first=True) for s in (record.q, record.k))
        records.add(dataclasses.replace(record, q=q, k=k))
    assert len(records) == 1


def norms(*exceptions: Any) -> list[Any]:
    return [pytest.param(n, id=n.__name__) for n in NORMS if n not in exceptions]


@pytest.mark.parametrize("norm", norms())
def test_each_spelling_of_a_norm_before_the_rotation(norm: Any) -> None:
    report = compiled_like_eager(Attention(norm=norm, eps=(1e-5, 1e-6)), hidden_states())
    for stream in streams(report):
        assert stream.norm == Norm("head", "before", has_weight=True)
        assert stream.rotation == half_pairs(16)
    assert report.fused[0].eps == (1e-5, 1e-6)


@pytest.mark.parametrize("norm", norms(inverted))
def test_each_spelling_of_a_norm_after_the_rotation(norm: Any) -> None:
    report = compiled_like_eager(
        Attention(norm=norm, after=True, eps=(1e-6, 1e-5)), hidden_states()
    )
    for stream in streams(report):
        assert stream.norm == Norm("head", "after", has_weight=True)
    assert report.fused[0].stages == ("rope", "rms_norm")
    assert report.fused[0].eps == (1e-6, 1e-5)


def test_a_weight_between_a_rotation_and_its_norm_leaves_the_norm_outside() -> None:
    """weight * x * rstd(x): the rotated x meets its weight before its own statistic."""
    report = compiled_like_eager(Attention(norm=inverted, after=True), hidden_states())
    assert all(stream.norm is None for stream in streams(report))


@pytest.mark.parametrize("after", [False, True])
def test_gemma_adds_one_to_the_weight(after: bool) -> None:
    report = compiled_like_eager(Attention(norm=gemma, after=after), hidden_states())
    when = "after" if after else "before"
    for stream in streams(report):
        assert stream.norm == Norm("head", when, has_weight=True, weight_offset=1.0)


@pytest.mark.parametrize("after", [False, True])
def test_a_norm_without_weight(after: bool) -> None:
    report = compiled_like_eager(Attention(norm=weightless, after=after), hidden_states())
    for stream in streams(report):
        assert stream.norm == Norm("head", "after" if after else "before", has_weight=False)


@pytest.mark.parametrize("norm", [rsqrt, spellings.square, gemma], ids=lambda n: n.__name__)
def test_a_norm_over_the_whole_width_hands_over_its_statistic(norm: Any) -> None:
    report = compiled_like_eager(Attention(norm=norm, wide=True), hidden_states())
    for stream in streams(report):
        assert stream.norm is not None and stream.norm.over == "given" and stream.has_scale


WIDE = [spellings.divided, spellings.functional, spellings.length, spellings.summed]


@pytest.mark.parametrize("packing", ["separate", "slices"])
@pytest.mark.parametrize("norm", WIDE, ids=lambda n: n.__name__)
def test_a_statistic_over_the_whole_width_that_no_node_holds_is_computed(
    norm: Any, packing: str
) -> None:
    toy = Attention(norm=norm, wide=True, packing=packing, eps=(0.5, 0.25))
    for stream in streams(compiled_like_eager(toy, hidden_states())):
        assert stream.norm == Norm("given", "before", has_weight=True) and stream.has_scale


@pytest.mark.parametrize("norm", [inverted, spellings.layer], ids=lambda n: n.__name__)
def test_over_the_whole_width_a_centred_row_or_half_a_call_is_cut(norm: Any) -> None:
    """1 / x is two calls in one; rows without their mean are in no node of a layer norm."""
    report = compiled_like_eager(Attention(norm=norm, wide=True), hidden_states())
    assert [f.stages for f in report.fused] == [("rope",)]
    assert [r.stage for r in report.refused] == ["cut", "cut"], "one for q, one for k"


def test_a_statistic_whose_rows_are_moved_is_a_factor_by_row() -> None:
    """With as many heads as tokens, another row's statistic fits as well."""

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps).transpose(1, 2) * weight

    toy = Attention(norm=norm, sizes=Sizes(4, 4))
    for stream in streams(compiled_like_eager(toy, hidden_states(4))):
        assert stream.norm is not None and stream.norm.over == "given"


def test_channels_that_move_between_a_norm_and_its_weight_leave_both_outside() -> None:
    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return weightless(x, weight, eps).flip(-1) * weight

    report = compiled_like_eager(Attention(norm=norm, after=True), hidden_states())
    assert {f.stages for f in report.fused} == {("rope", "rms_norm")}
    assert all(not f.record.q.norm.has_weight for f in report.fused)


@pytest.mark.parametrize("statistic", [None, lambda x: x.roll(1, 1)], ids=["wide", "by head"])
def test_a_k_alone_with_operands_by_head(statistic: Any) -> None:
    """Its site sees no head of q."""

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return x * (statistic(rstd) if statistic else rstd) * weight

    toy = Layer(by_index_copy, wide=statistic is None)
    toy.norm = norm

    def rotate(q, k, cos, sin):
        return q.tanh(), llama(k, cos, sin)

    toy.rotate = rotate  # type: ignore[method-assign]
    assert stages(check(toy)) == ["store(k,v)"]


def test_a_sum_over_a_count_with_a_rounded_inverse_is_a_mean() -> None:
    """98 * (1 / 98) is the float below one."""

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(torch.sum(x * x, -1, keepdim=True) * (1 / 98) + eps) * weight

    toy = Attention(norm=norm, sizes=Sizes(2, 2, 98, 98))
    for stream in streams(compiled_like_eager(toy, hidden_states())):
        assert stream.norm == Norm("head", "before", has_weight=True)


@quick
@given(
    eps=st.tuples(*[st.sampled_from([1e-5, 1e-6, 1e-8]) | st.floats(1e-9, 1e-2)] * 2),
    norm=st.sampled_from([n for n in NORMS if n is not spellings.functional]),
)
def test_eps_is_read_from_the_graph(eps: tuple[float, float], norm: Any) -> None:
    torch._dynamo.reset()
    assert explain(Attention(norm=norm, eps=eps), hidden_states()).fused[0].eps == eps


PACKINGS = ["separate", "by head", "one view", "slices"]


@st.composite
def toys(draw: Any) -> Attention:
    pairs = draw(st.integers(1, 9))
    extra = draw(st.sampled_from([0, 0, 1, 2, 7]))
    packing = draw(st.sampled_from(PACKINGS))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads if packing == "by head" else kv_heads * draw(st.integers(1, 3))
    return Attention(
        draw(st.sampled_from(ROPES)),
        draw(st.sampled_from([None, rsqrt, spellings.square, gemma, weightless])),
        after=extra == 0 and draw(st.booleans()),
        packing=packing,
        partial=draw(st.sampled_from(["inside", "outside", "empty"])),
        tokens_first=draw(st.booleans()),
        sizes=Sizes(heads, kv_heads, 2 * pairs + extra, 2 * pairs, hidden=24),
    )


@settings(quick, max_examples=20)
@given(toys(), st.integers(1, 6), st.integers(1, 3))
def test_any_sizes_fuse_and_are_right(toy: Attention, tokens: int, batch: int) -> None:
    torch._dynamo.reset()
    report = compiled_like_eager(toy, hidden_states(tokens, batch, width=24))
    assert report.fused and report.refused == []
    for fused in report.fused:
        for stream in (fused.record.q, fused.record.k):
            assert stream is None or stream.rotation is not None


@pytest.mark.parametrize("partial", ["inside", "outside"])
def test_the_rest_of_a_head_passes_through(partial: str) -> None:
    toy = Attention(partial=partial, sizes=Sizes(rotary=10))
    for stream in streams(compiled_like_eager(toy, hidden_states())):
        assert stream.rotation == half_pairs(10)
        assert stream.passes == (Pass(10, 10, 6),)


def test_an_empty_rest_is_a_whole_head() -> None:
    """phi3 and minimax slice `x[..., rotary:]` even where nothing is left."""
    for stream in streams(compiled_like_eager(Attention(partial="empty"), hidden_states())):
        assert (stream.rotation, stream.passes) == (half_pairs(16), ())


def test_heads_and_channels_that_were_cut_and_joined_are_whole_again() -> None:
    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = torch.cat([x[:, :1], x[:, 1:]], 1)
        return rsqrt(torch.cat([x[..., :3], x[..., 3:]], -1), weight, eps)

    for stream in streams(compiled_like_eager(Attention(norm=norm), hidden_states())):
        assert (stream.norm, stream.rotation) == (Norm("head", "before", True), half_pairs(16))


def test_a_conjugated_circle_is_read_through() -> None:
    def table(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        circle = torch.polar(torch.ones_like(angles), -angles).conj()
        return circle, circle

    rope = Rope(spellings.llama4, table)
    for stream in streams(compiled_like_eager(Attention(rope), hidden_states())):
        assert stream.rotation is not None and stream.rotation.signs == (1, -1)


def test_a_split_with_an_empty_part() -> None:
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        _, first, second = x.split([0, 8, 8], -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    for stream in streams(compiled_like_eager(Attention(Rope(turn)), hidden_states())):
        assert stream.rotation == half_pairs(16)


def test_a_rotated_part_in_the_middle_of_a_head() -> None:
    def middle(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b, c = x.split([3, 8, 5], -1)
        return torch.cat([a, llama(b, cos, sin), c], -1)

    toy = Attention(Rope(middle), sizes=Sizes(rotary=8))
    toy.sizes = Sizes()
    for stream in streams(compiled_like_eager(toy, hidden_states())):
        assert stream.rotation is not None
        assert stream.rotation.x == Pair(3, 7, 1) and stream.rotation.cos == Pair(0, 4, 1)
        assert stream.passes == (Pass(0, 0, 3), Pass(11, 11, 5))


def test_a_constant_on_the_result_is_part_of_the_record() -> None:
    report = compiled_like_eager(Attention(between=lambda q, k: (q * 0.25, k)), hidden_states())
    q, k = streams(report)
    assert (q.scale, k.scale) == (0.25, 1.0)
