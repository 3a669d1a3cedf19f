"""What looks like mRoPE and is none stays right, and the lookup stays the graph's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.patterns import lookup
from fxfuse.patterns.site import Access
from fxfuse.patterns.value import Kind, Leaf, Opaque, Value
from fxfuse.slots import Call, Slot
from tests.mrope_toys import (
    PICKS,
    TOKENS,
    WHOLE,
    MRope,
    Pick,
    Prelude,
    Sizes,
    contiguous,
    looked_up,
    positions,
    report_of,
    turns,
)

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


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
