"""The sweep itself: what is left of a rotation, what makes it fail, which sites are lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from fxfuse.sweep.measure import Watching
from fxfuse.sweep.residue import remains_of
from fxfuse.sweep.results import Results, Run, UnitResult, load, save
from fxfuse.sweep.rotations import attention_calls, is_rotation, rotary_counts
from fxfuse.sweep.run import run_units
from fxfuse.sweep.summary import failures
from tests.sweep.expected import Row, accept, lost_sites, read
from tests.sweep.sample import SAMPLE

pytestmark = pytest.mark.null
X, TABLE = (1, 4, 6, 8), (6, 8)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def written_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., 0::2], x[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos[..., 0::2] - second * sin[..., 0::2]
    out[..., 1::2] = first * sin[..., 0::2] + second * cos[..., 0::2]
    return out


def added_to_a_product(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, rotate_half(x), sin)


def complex_product(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turns = torch.complex(cos, sin)[..., ::2].contiguous()
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


class Attention(nn.Module):
    """q and k are rotated as `rotate` says; the tables are made in the graph."""

    def __init__(self, rotate: object) -> None:
        super().__init__()
        self.rotate = rotate
        self.register_buffer("inv_freq", torch.rand(4))

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None] * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = 0.5 * angles.cos().to(q.dtype), 0.5 * angles.sin()
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        return scaled_dot_product_attention(q, k, k)


def traced(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The graph as Dynamo hands it to a backend."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: object) -> object:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=keep)(*inputs)
    return graphs[0]


def qk_and_positions() -> tuple[Tensor, ...]:
    return torch.randn(X), torch.randn(X), torch.arange(6)


@pytest.mark.parametrize(
    ("rotate", "products"),
    [(halves, 4), (written_in_place, 8), (added_to_a_product, 4), (complex_product, 2)],
)
def test_a_rotation_that_is_left_is_residue(rotate: object, products: int) -> None:
    remains = remains_of(traced(Attention(rotate), *qk_and_positions()))
    assert len(remains.residue) == products
    assert "test_sweep.py" in remains.residue[0].where
    assert remains.ops == 0


def test_a_fused_graph_has_no_residue_and_the_ops_that_the_report_claims() -> None:
    torch._dynamo.reset()
    backend = Watching(compiler="eager")
    with torch.no_grad():
        torch.compile(Attention(halves), backend=backend)(*qk_and_positions())
    [remains], [report] = backend.remains, backend.reports
    assert remains.residue == ()
    assert remains.ops == len(report.fused) == 1
    assert backend.runs == [1]


def test_tables_that_are_inputs_are_known_by_name() -> None:
    class Rotated(nn.Module):
        def forward(self, q: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
            return scaled_dot_product_attention(q, halves(q, *position_embeddings), q)

    tables = (torch.randn(TABLE), torch.randn(TABLE))
    assert len(remains_of(traced(Rotated(), torch.randn(X), tables)).residue) == 2


class AddedPositions(nn.Module):
    """Sines are added to the embedding, and multiplied by numbers only."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + 2.0 * torch.cat([angles.sin(), angles.cos()], dim=-1)
        return scaled_dot_product_attention(x, x, x)


class TimeSteps(nn.Module):
    """A time step, embedded as sines, scales what a projection reads."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        scale = linear(torch.cat([angles.sin(), angles.cos()], dim=-1), torch.eye(8))
        x = linear(x * scale, torch.eye(8))
        return scaled_dot_product_attention(x, x, x)


class RotatedInput(nn.Module):
    """What is rotated is projected afterwards: between projection and attention nothing turns."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        table = torch.cat([angles, angles], dim=-1)
        x = linear(halves(x, table.cos(), table.sin()), torch.eye(8))
        return scaled_dot_product_attention(x, x, x)


class ScaledAngles(nn.Module):
    """A cosine scales the angles, of which a table is made that rotates nothing here."""

    def forward(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        table = (angles * torch.arange(4.0).cos()).sin()
        return scaled_dot_product_attention(x, x, x), table


@pytest.mark.parametrize("module", [AddedPositions, TimeSteps, RotatedInput, ScaledAngles])
def test_sines_that_rotate_no_q_or_k_are_no_residue(module: type[nn.Module]) -> None:
    graph = traced(module(), torch.randn(X), torch.randn(6, 4))
    assert remains_of(graph).residue == ()


@pytest.mark.parametrize(
    ("function", "rotates"),
    [
        ("apply_rotary_pos_emb", True),
        ("apply_multimodal_rotary_pos_emb", True),
        ("apply_interleaved_rotary_emb", True),
        ("rotate_half", True),
        ("rotate_every_two", True),
        ("apply_interleaved_mrope", False),
        ("rope", False),
        ("rotary_embedding", False),
        ("apply_mask", False),
    ],
)
def test_names_of_rotations(function: str, rotates: bool) -> None:
    assert is_rotation(function) is rotates


def test_rotations_are_counted_by_the_attention_that_calls_them() -> None:
    class ToyAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return rotate_half(x) + rotate_half(x)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    layer = ToyAttention()
    with attention_calls() as calls:
        nn.Sequential(Plain(), layer, ToyAttention(), layer)(torch.randn(X))
    counts = rotary_counts(calls)
    assert (counts.layers, counts.calls, counts.tensors, counts.storing) == (2, 3, 6, 0)


def result(unit: str = "llama", **run: object) -> Results:
    rotary = {"layers": 2, "calls": 2, "tensors": 4, "storing": 2, "straight": 2}
    sites = {"fused": 2, "stored": 2, "tensors": 4}
    made = Run("static_decode", "float32", **{"rotary": rotary, **sites, **run})
    return Results({}, {unit: UnitResult(unit, runs=[made])})


def test_expected_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "expected.txt"
    refusals = [
        {"stage": "store", "reason": "rows of 3 axes", "where": "a.py:1"},
        {"stage": "store", "reason": "rows of 3 axes", "where": "a.py:2"},
        {"stage": "rope", "reason": "a table, 2 tokens", "where": "b.py:1"},
    ]
    accept(result("gemma3", refusals=refusals), file)
    accept(result("llama"), file)
    refused = ("rope: a table, 2 tokens", "store: rows of 3 axes")
    assert list(read(file).values()) == [
        Row("gemma3", "static_decode", 2, 2, 2, 2, 4, 4, 0, refused),
        Row("llama", "static_decode", 2, 2, 2, 2, 4, 4, 0, ()),
    ]


@pytest.mark.parametrize(
    ("found", "lost"),
    [
        ({}, 0),
        ({"fused": 1}, 1),
        ({"stored": 1}, 1),
        ({"tensors": 2}, 1),
        ({"fused": 4, "stored": 4}, 0),
    ],
)
def test_fewer_sites_than_expected_are_lost(tmp_path: Path, found: dict, lost: int) -> None:
    file = tmp_path / "expected.txt"
    accept(result(), file)
    assert len(lost_sites(result(**found), file)) == lost


@pytest.mark.parametrize(
    ("found", "problems"),
    [
        ({}, []),
        ({"status": "wrong"}, ["wrong"]),
        ({"status": "crash"}, ["crash"]),
        ({"status": "stock"}, []),
        ({"residue": ["mul at a.py:1"]}, ["residue"]),
        ({"residue": ["mul at a.py:1"], "tensors": 2}, ["residue"]),
        ({"residue": ["mul at a.py:1"], "fused": 1, "tensors": 2}, []),
        ({"rotary": {}, "fused": 1}, ["fused where nothing rotates"]),
    ],
)
def test_what_makes_a_sweep_fail(found: dict, problems: list[str]) -> None:
    assert [p.partition(":")[0] for p in failures(result(**found))] == problems


def test_results_are_read_back_from_json(tmp_path: Path) -> None:
    file = tmp_path / "results" / "sweep.json"
    save(result(), file)
    assert load(file) == result()
    assert load(tmp_path / "absent.json") == Results()


def test_a_unit_that_fails_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfuse.sweep import run
    from fxfuse.sweep.measure import Plan

    def measure(unit: str, _: Plan) -> UnitResult:
        if unit == "slow":
            import time

            time.sleep(60)
        if unit == "raises":
            raise ValueError("no such size")
        if unit == "dies":
            import os

            os._exit(3)
        return UnitResult(unit)

    monkeypatch.setattr(run, "measure", measure)
    names = ["fine", "slow", "raises", "dies"]
    found = {r.unit: r.not_run for r in run_units(names, Plan(), jobs=4, timeout=2)}
    assert found == {
        "fine": "",
        "slow": "more than 2 s",
        "raises": "ValueError: no such size",
        "dies": "exit code 3",
    }


def test_the_sample_has_rows_for_every_unit() -> None:
    assert SAMPLE.keys() <= {row.unit for row in read().values()}
