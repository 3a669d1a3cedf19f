"""Three positions a token (mRoPE): which axis a pair turns by is read off the graph, and the rows
of the table are looked up by the op.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fxfuse
from fxfuse.patterns import lookup
from fxfuse.patterns.axes import columns_of, runs_of
from fxfuse.patterns.record import Record
from fxfuse.patterns.site import Access
from fxfuse.patterns.value import Kind, Leaf, Opaque, Value
from fxfuse.slots import Call, Slot
from tests.mrope_toys import (
    PICKS,
    MRope,
    Pick,
    Prelude,
    Sizes,
    axes_of,
    contiguous,
    positions,
    turns,
)
from tests.sites import BY_AXES, SITES
from tests.toys import assert_like

pytestmark = pytest.mark.null

TOKENS = 7
WHOLE, PARTIAL = Sizes(), Sizes(section=(4, 2, 3))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def hidden(toy: Prelude, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, toy.sizes.hidden, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def report_of(toy: Prelude, at: Tensor, compiler: str = "eager") -> fxfuse.Report:
    """The report of a toy; its result must be eager's."""
    x = hidden(toy, at.shape[-1])
    want = toy(x, at)
    got = torch.compile(toy, backend=fxfuse.Backend(compiler=compiler))(x, at)
    assert_like(got, want)
    report = fxfuse.last_report()
    assert report is not None
    return report


def looked_up(report: fxfuse.Report) -> Record | None:
    """The record of the only site, if the op looks its table up."""
    (site,) = report.fused
    assert isinstance(site.record, Record)
    return site.record if "rope(by position)" in site.stages else None


@pytest.mark.parametrize("sizes", [WHOLE, PARTIAL], ids=["whole", "partial"])
@pytest.mark.parametrize("neox", [True, False], ids=["neox", "neighbours"])
@pytest.mark.parametrize("pick", PICKS)
def test_the_axis_of_each_pair_is_read(pick: str, neox: bool, sizes: Sizes) -> None:
    toy = Prelude(MRope(PICKS[pick], neox, sizes))
    record = looked_up(report_of(toy, positions(TOKENS, sizes.rows)))
    assert record is not None and record.k is not None
    for stream in (record.q, record.k):
        turn = stream.rotation
        assert turn is not None and turn.axes == axes_of(pick, list(sizes.section))
        # Cosines in the first half of a row, sines in the second.
        half = sizes.rotary // 2
        assert (turn.cos.first, turn.sin.first, turn.cos.step) == (0, half, 1)


@pytest.mark.parametrize("pick", PICKS)
def test_a_change_of_one_axis_changes_the_result(pick: str) -> None:
    """The three rows of the tests' positions are told apart: by one row for all it is another."""
    toy, at = Prelude(MRope(PICKS[pick])), positions(TOKENS, WHOLE.rows)
    want = toy(hidden(toy), at)
    for axis in range(3):
        other = at.clone()
        other[axis] = at[(axis + 1) % 3]
        assert (toy(hidden(toy), other) - want).abs().max() > 1e-3


class FullWidth(MRope):
    """Tables as wide as what is turned, both halves alike, joined before or behind the pick."""

    late = True

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin_cache[positions].chunk(2, dim=-1)
        section = list(self.sizes.section)
        if self.late:
            return self.pick(cos, section).repeat(1, 2), self.pick(sin, section).repeat(1, 2)
        cos, sin = (torch.cat((t, t), dim=-1) for t in (cos, sin))
        return self.pick(cos, 2 * section), self.pick(sin, 2 * section)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.view(cos.shape[0], -1, self.sizes.head_dim)
        a, b = x.chunk(2, -1)
        y = x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)
        return y.reshape(cos.shape[0], -1)


def contiguous_twice(x: Tensor, section: list[int]) -> Tensor:
    return torch.cat([m[i % 3] for i, m in enumerate(x.split(section, dim=-1))], dim=-1)


@pytest.mark.parametrize("late", [True, False])
def test_full_width_tables(late: bool) -> None:
    rope = FullWidth(contiguous_twice)
    rope.late = late
    record = looked_up(report_of(Prelude(rope), positions(TOKENS, WHOLE.rows)))
    assert record is not None and record.q.rotation is not None
    assert record.q.rotation.axes == axes_of("contiguous", list(WHOLE.section))


class TwoTables(MRope):
    """cos and sin in tables of their own."""

    def __init__(self, pick: Pick) -> None:
        super().__init__(pick)
        cos, sin = self.cos_sin_cache.chunk(2, dim=-1)
        self.register_buffer("cos", cos.clone())
        self.register_buffer("sin", sin.clone())

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        section = list(self.sizes.section)
        cos, sin = (self.pick(table[positions], section) for table in (self.cos, self.sin))
        return cos, sin


@pytest.mark.parametrize("pick", PICKS)
def test_cos_and_sin_in_tables_of_their_own(pick: str) -> None:
    record = looked_up(report_of(Prelude(TwoTables(PICKS[pick])), positions(TOKENS, WHOLE.rows)))
    assert record is not None and record.q.rotation is not None
    assert record.q.rotation.sin.first == 0
    assert record.q.rotation.axes == axes_of(pick, list(WHOLE.section))


@pytest.mark.parametrize("pick", PICKS)
def test_a_table_in_bfloat16(pick: str) -> None:
    toy = Prelude(MRope(PICKS[pick], dtype=torch.bfloat16))
    assert looked_up(report_of(toy, positions(TOKENS, WHOLE.rows))) is not None


class Batched(Prelude):
    """Positions [3, B, T] of hidden states [B T, C], by the same table."""

    def __init__(self, rope: MRope, batch: int) -> None:
        super().__init__(rope)
        self.batch = batch

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        s, lead = self.sizes, (self.batch, -1)
        q, k, v = (t.view(*lead, t.shape[-1]) for t in self.split(x))
        cos, sin = self.rope.tables(positions)
        cos, sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
        q, k, v = (t.unflatten(-1, (-1, s.head_dim)).transpose(1, 2) for t in (q, k, v))

        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat((-b, a), -1) * sin

        return torch.nn.functional.scaled_dot_product_attention(
            turned(q), turned(k), v, enable_gqa=True
        )


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("batch", [1, 2])
def test_positions_by_batch_row(pick: str, batch: int) -> None:
    at = torch.stack([positions(TOKENS, WHOLE.rows, seed) for seed in range(batch)], 1)
    toy = Batched(MRope(PICKS[pick]), batch)
    with torch.no_grad():
        x = hidden(toy, batch * TOKENS)
        want = toy(x, at)
        got = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))(x, at)
    assert_like(got, want)
    assert looked_up(fxfuse.last_report()) is not None


@pytest.mark.parametrize("tokens", [1, 2])
def test_of_few_tokens(tokens: int) -> None:
    assert looked_up(report_of(Prelude(MRope(contiguous)), positions(tokens, WHOLE.rows)))


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("shift", [WHOLE.rows, 0], ids=["from the end", "int32"])
def test_positions_from_the_end_and_of_32_bits(pick: str, shift: int) -> None:
    at = positions(TOKENS, WHOLE.rows) - shift
    at = at if shift else at.int()
    assert looked_up(report_of(Prelude(MRope(PICKS[pick])), at)) is not None


def test_what_two_layers_read_is_looked_up_once() -> None:
    toy = Prelude(MRope(PICKS["interleaved"]), layers=2)
    stages = [s for f in report_of(toy, positions(TOKENS, WHOLE.rows)).fused for s in f.stages]
    assert stages == ["rms_norm", "rope"] * 2


def test_the_report_tells_the_axes() -> None:
    report = report_of(Prelude(MRope(contiguous)), positions(TOKENS, WHOLE.rows))
    assert "[32 channels, half pairs by 3 axes]" in str(report)


def test_one_position_a_token_is_the_special_case() -> None:
    record = looked_up(report_of(Prelude(MRope(contiguous)), positions(TOKENS, WHOLE.rows)[0]))
    assert record is not None and record.q.rotation is not None
    assert record.q.rotation.axes == ()


def test_one_compile_for_every_number_of_tokens() -> None:
    toy, counter = Prelude(MRope(PICKS["in turns"])), 0

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal counter
        counter += 1
        return fxfuse.Backend(compiler="eager")(gm, inputs)

    compiled = torch.compile(toy, backend=backend, dynamic=True)
    for tokens in (5, 9, 12):
        x, at = hidden(toy, tokens), positions(tokens, WHOLE.rows)
        with torch.no_grad():
            assert_like(compiled(x, at), toy(x, at))
            assert looked_up(fxfuse.last_report()) is not None
    assert counter == 1


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "neighbours"])
def test_through_inductor(neox: bool) -> None:
    toy = Prelude(MRope(PICKS["in turns"], neox, PARTIAL))
    at = positions(TOKENS, PARTIAL.rows) - PARTIAL.rows
    assert looked_up(report_of(toy, at, "inductor")) is not None


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pick=st.sampled_from(sorted(PICKS)),
    neox=st.booleans(),
    section=st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4)),
    passed=st.integers(0, 3),
    tokens=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_any_sections(
    pick: str, neox: bool, section: tuple[int, ...], passed: int, tokens: int, seed: int
) -> None:
    torch._dynamo.reset()
    sizes = Sizes(section=section, head_dim=2 * (sum(section) + passed))
    toy = Prelude(MRope(PICKS[pick], neox, sizes))
    record = looked_up(report_of(toy, positions(tokens, sizes.rows, seed)))
    assert record is not None and record.q.rotation is not None
    assert record.q.rotation.axes == axes_of(pick, list(section))


# --- near misses: right, and the lookup stays the graph's ---------------------------------------


class CastTable(MRope):
    """The table in the activations' dtype, as one engine has it: cast anew in each forward."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin_cache.to(torch.bfloat16)[positions].chunk(2, dim=-1)
        section = list(self.sizes.section)
        return self.pick(cos, section), self.pick(sin, section)


@pytest.mark.parametrize("rope", [MRope, CastTable])
@pytest.mark.parametrize("pick", PICKS)
def test_activations_in_bfloat16(pick: str, rope: type[MRope]) -> None:
    """The op reads the float32 table itself, and is no further from float64 than eager is."""
    toy, at = Prelude(rope(PICKS[pick])), positions(TOKENS, WHOLE.rows)
    with torch.no_grad():
        exact = Prelude(MRope(PICKS[pick], dtype=torch.float64)).double()
        exact.load_state_dict({n: w.bfloat16() for n, w in toy.state_dict().items()})
        exact.rope.cos_sin_cache.copy_(toy.rope.cos_sin_cache)
        x = hidden(toy).bfloat16()
        want = exact(x.double(), at)
        toy.qkv, toy.out = toy.qkv.bfloat16(), toy.out.bfloat16()
        eager = toy(x, at)
        got = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))(x, at)
    record = looked_up(fxfuse.last_report())
    assert record is not None and record.q.dtype == "bfloat16"
    errors = [(y.double() - want).norm() for y in (got, eager)]
    # What the rest of the layer rounds is in both; a rounding more or less moves it a little.
    assert errors[0] <= 1.2 * errors[1]


def short(x: Tensor, section: list[int]) -> Tensor:
    """Sections that end before the row does."""
    return contiguous(x[..., :-2], [*section[:2], section[2] - 2])


def of_another(x: Tensor, section: list[int]) -> Tensor:
    """The last section of what is no row of the table."""
    parts = [m[i] for i, m in enumerate(x.split(section, dim=-1))]
    return torch.cat([*parts[:2], parts[2] * 0.5], dim=-1)


def shifted_tokens(x: Tensor, section: list[int]) -> Tensor:
    """The second section by the positions of the tokens before."""
    parts = [m[i] for i, m in enumerate(x.split(section, dim=-1))]
    return torch.cat([parts[0], parts[1].roll(1, 0), parts[2]], dim=-1)


def written(x: Tensor, section: list[int]) -> Tensor:
    y = contiguous(x, section)
    return torch.sin(y, out=y)


def partly_written(x: Tensor, section: list[int]) -> Tensor:
    rows = x.clone()
    parts = [m[i] for i, m in enumerate(rows.split(section, dim=-1))]
    rows.clamp_(max=0.3)
    return torch.cat(parts, dim=-1)


def irregular(x: Tensor, section: list[int]) -> Tensor:
    """The numbers of a row in an order that no even steps make."""
    y = contiguous(x, section)
    return torch.cat([y[..., 1:2], y[..., :1], y[..., 2:]], dim=-1)


def by_what_an_input_says(x: Tensor, section: list[int]) -> Tensor:
    """The map depends on the data, if only as zeros."""
    axes = torch.tensor(turns(section)) + (x[0, 0, :1] * 0).long()
    return x[axes, :, torch.arange(sum(section))].T


def by_a_map_written_to(x: Tensor, section: list[int]) -> Tensor:
    axes = torch.tensor(turns(section))
    axes.clamp_(max=1)
    return x[axes.view(-1), :, torch.arange(sum(section))].T


def of_other_tokens(x: Tensor, section: list[int]) -> Tensor:
    """Each pair's axis, and the token before."""
    axes = torch.tensor(turns(section)).expand(1, x.shape[1] - 1, -1)
    y = x.gather(0, axes)[0]
    return torch.cat([y[:1], y], 0)


MISSES: dict[str, Pick] = {
    "by what an input says": by_what_an_input_says,
    "by a map written to": by_a_map_written_to,
    "of other tokens": of_other_tokens,
    "another": of_another,
    "shifted tokens": shifted_tokens,
    "written": written,
    "partly written": partly_written,
    "irregular": irregular,
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses_stay_right(name: str) -> None:
    report = report_of(Prelude(MRope(MISSES[name])), positions(TOKENS, WHOLE.rows))
    assert all("rope(by position)" not in fused.stages for fused in report.fused)


def test_sections_that_do_not_fill_a_row_turn_fewer_channels() -> None:
    sizes = Sizes(section=(6, 5, 5))

    class Short(MRope):
        def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            width, x = 2 * cos.shape[-1], x.view(cos.shape[0], -1, self.sizes.head_dim)
            a, b = x[..., :width].chunk(2, -1)
            c, s = cos.unsqueeze(1), sin.unsqueeze(1)
            return torch.cat((a * c - b * s, b * c + a * s, x[..., width:]), -1).flatten(1)

    record = looked_up(report_of(Prelude(Short(short, sizes=sizes)), positions(TOKENS, sizes.rows)))
    assert record is not None and record.q.rotation is not None
    assert record.q.rotation.axes == axes_of("contiguous", [6, 5, 3])
    assert record.q.rotation.sin.first == 16


class TwoPositions(MRope):
    """A section by positions of another tensor."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        ours, other = (self.cos_sin_cache[p].chunk(2, -1) for p in (positions, positions.flip(1)))
        cos, sin = (
            torch.cat([a[0, :, :6], b[1, :, 6:11], a[2, :, 11:]], -1)
            for a, b in zip(ours, other, strict=True)
        )
        return cos, sin


class ComputedTable(MRope):
    """A table made in each forward is looked up by the graph, which makes the rows alone."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (self.cos_sin_cache * 0.5)[positions].chunk(2, dim=-1)
        section = list(self.sizes.section)
        return self.pick(cos, section), self.pick(sin, section)


class TableWrittenBehindItsCast(MRope):
    """The cast has what stood in the table before."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        before = self.cos_sin_cache.double()
        self.cos_sin_cache.clamp_(max=2.0)
        cos, sin = before[positions].float().chunk(2, dim=-1)
        section = list(self.sizes.section)
        return self.pick(cos, section), self.pick(sin, section)


class CastWrittenTo(MRope):
    """The cast is written to, the table is not."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        wide = self.cos_sin_cache.double()
        torch.sin(wide, out=wide)
        cos, sin = wide[positions].float().chunk(2, dim=-1)
        section = list(self.sizes.section)
        return self.pick(cos, section), self.pick(sin, section)


class MapInABuffer(MRope):
    """The map is an input of the graph: what it says may change from call to call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("axes", torch.tensor(turns(list(self.sizes.section))))

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin_cache[positions].chunk(2, dim=-1)
        columns = torch.arange(cos.shape[-1])
        cos, sin = (t[self.axes, :, columns].T for t in (cos, sin))
        return cos, sin


class CrossedAxes(MRope):
    """cos and sin of a pair by different axes."""

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin_cache[positions].chunk(2, dim=-1)
        section = list(self.sizes.section)
        return self.pick(cos, section), self.pick(sin, section[::-1])


UNFIT = [
    TwoPositions,
    CrossedAxes,
    MapInABuffer,
    ComputedTable,
    TableWrittenBehindItsCast,
    CastWrittenTo,
]


@pytest.mark.parametrize("rope", UNFIT)
def test_tables_that_no_map_of_pairs_gives_stay_the_graphs(rope: type[MRope]) -> None:
    toy = Prelude(rope(contiguous, sizes=Sizes(section=(7, 5, 4))))
    assert looked_up(report_of(toy, positions(TOKENS, WHOLE.rows))) is None


NODE: Any = None


def slot(shape: tuple[int, ...], device: str, call: Call | None = None, **kwargs: Any) -> Slot:
    dtype = kwargs.get("dtype", torch.float32)
    stride = torch.empty(shape, device="meta").stride()
    made = Slot(shape, stride, 0, dtype, torch.device(device), 0, NODE, call)
    if call is not None:
        call.outs = (made,)
    return made


@pytest.mark.parametrize("moved", ["positions", "rows"])
def test_what_lies_on_two_devices_is_looked_up_by_the_graph(moved: str) -> None:
    """A table on a GPU may be indexed by positions on the CPU, which its kernels cannot read."""
    where = "cpu" if moved == "positions" else "cuda"
    table, at = slot((9, 4), "cuda"), slot((5,), where, dtype=torch.int64)
    calls = [Call(torch.ops.aten.index.Tensor, (table, [at]), {}, NODE)]
    rows = slot((5, 4), "cuda", calls[0])
    if moved == "rows":
        calls.append(Call(torch.ops.aten._to_copy.default, (rows,), {}, NODE))
        rows = slot((5, 4), "cpu", calls[1])
    leaf = Leaf(0, rows.shape, rows.dtype, Kind.TABLE, rows)
    reading = SimpleNamespace(
        positions={call: i for i, call in enumerate(calls)}, writes={}, versions_at=lambda *_: 0
    )
    memory: Any = SimpleNamespace(reading=reading)
    with pytest.raises(Opaque, match="another device"):
        lookup.looked(Access(leaf, ()), NODE, memory, {})


@pytest.mark.parametrize("wrong", ["axes", "columns"])
def test_a_wrong_map_is_disproved(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Were the map read wrongly, the graph would keep its lookup, and the report would say so."""

    read = lookup.rows_and_places

    def misread(value: Value) -> Any:
        rows, places, axis = read(value)
        turn, shift = (1, 0) if wrong == "axes" else (0, WHOLE.rotary // 2)
        return rows, tuple(((a + turn) % 3, (c + shift) % WHOLE.rotary) for a, c in places), axis

    monkeypatch.setattr(lookup, "rows_and_places", misread)
    toy, at = Prelude(MRope(PICKS["in turns"])), positions(TOKENS, WHOLE.rows)
    assert looked_up(report_of(toy, at)) is None
    assert "cos by position differs from what the graph looks up" in caplog.text


def test_an_error_leaves_the_lookup_to_the_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lookup, "rows_and_places", lambda value: 1 / 0)
    assert looked_up(report_of(Prelude(MRope(contiguous)), positions(TOKENS, WHOLE.rows))) is None
    assert "keeps its lookup" in caplog.text


# --- the map -------------------------------------------------------------------------------------


def painted(axes: tuple[int, ...]) -> list[int]:
    found = [-1] * len(axes)
    for run in runs_of(axes):
        for i in range(run.count):
            found[run.first + i * run.step] = run.axis
    return found


def test_runs_paint_their_map() -> None:
    for length in (1, 2, 6):
        for axes in itertools.product(range(3), repeat=length):
            assert painted(axes) == list(axes)


@pytest.mark.parametrize(
    ("pick", "section", "runs"),
    [
        ("contiguous", [16, 24, 24], 3),
        ("interleaved", [24, 20, 20], 3),
        ("interleaved", [11, 11, 10], 3),
        ("in turns", [8, 12, 12], 4),
    ],
)
def test_the_maps_in_use_are_few_runs(pick: str, section: list[int], runs: int) -> None:
    axes = axes_of(pick, section)
    assert painted(axes) == list(axes) and len(runs_of(axes)) == runs


@pytest.mark.parametrize("name", BY_AXES)
def test_a_record_is_read_back_from_its_text(name: str) -> None:
    assert Record.from_text(SITES[name].to_text()) == SITES[name]


def test_pairs_of_two_axes_do_not_share_a_column() -> None:
    q = SITES["mrope"].q
    assert q.rotation is not None
    other = dataclasses.replace(q, rotation=dataclasses.replace(q.rotation, axes=(1,) * 16))
    with pytest.raises(ValueError, match="column 0 of cos is read by axes 0 and 1"):
        columns_of(Record(q, other), "cos")
    plain = dataclasses.replace(q, rotation=dataclasses.replace(q.rotation, axes=()))
    with pytest.raises(ValueError, match="both have axes or neither"):
        columns_of(Record(q, plain), "cos")
