"""fxfuse bench: what it times is what it says, and nothing wrong is timed."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from fxfuse import cli
from fxfuse.bench import check, measure, opponents, plot, recipes, rows, timing, tune
from fxfuse.bench.chains import Chain
from fxfuse.bench.opponents import Opponent
from fxfuse.bench.recipes import Case
from fxfuse.lowering.tiles import Rows, Tile, tile_for

T = 5
ROWS = (1, 48, 64, 500, 700, 2048, 4096, 10_000, 2**15, 2**18, 2**20)
WHOLE = [(name, layout) for name in recipes.RECIPES for layout in recipes.RECIPES[name].chains]


def small(recipe: str, layout: str | None = None, tokens: int = T) -> Case:
    """The first case of a recipe with few heads."""
    case = recipes.cases(recipe, "cpu", [tokens], layout=layout)[0]
    group = 4 if case.shape.heads == case.shape.kv_heads else 2
    shape = dataclasses.replace(case.shape, heads=4, kv_heads=group)
    return dataclasses.replace(case, shape=shape)


def run_of(build: Any) -> Opponent:
    return Opponent("other", build, ("cpu",))


@pytest.fixture
def few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "TABLE_ROWS", 64)
    recipes.rope_table.cache_clear()


@pytest.mark.null
@pytest.mark.parametrize("tokens", [1, T])
@pytest.mark.parametrize(("name", "layout"), WHOLE)
def test_every_chain_fuses_whole(name: str, layout: str, tokens: int, few_positions: None) -> None:
    for case in recipes.cases(name, "cpu", [tokens], layout=layout):
        torch._dynamo.reset()
        arguments = recipes.draw(case, "cpu", 0).args
        backend = fxfuse.Backend(compiler="eager", gate=recipes.RECIPES[name].gate)
        with torch.no_grad():
            torch.compile(recipes.chain(case, "cpu"), backend=backend)(*arguments)
        report = fxfuse.last_report()
        assert report is not None
        assert [" + ".join(site.stages) for site in report.fused] == [case.stages], report
        assert not report.refused


@pytest.mark.null
@pytest.mark.parametrize("recipe", tune.RECIPES)
def test_tune_times_what_the_recipes_fuse(recipe: str, few_positions: None) -> None:
    for case in recipes.cases(recipe, "cpu", [T]):
        calls = tune.caught(case, "cpu", [0, 1])
        given = [recipes.draw(case, "cpu", seed).args[0] for seed in (0, 1)]
        for call, first in zip(calls, given, strict=True):
            q = call.tensors["q"]
            # A view of the inputs as they were drawn.
            assert q is not None and torch.equal(q.flatten()[:8], first.flatten()[:8])
            assert (call.record.store is not None) == recipes.RECIPES[recipe].store
            assert call.tensors["q_out"].isnan().all()
        tiles = tune.candidates(calls[0], T)
        assert tiles and all(t.tokens <= T and t.heads <= 2 * calls[0].heads() for t in tiles)


@pytest.mark.null
@pytest.mark.parametrize(
    ("channels", "run", "rows", "wanted"),
    [
        (128, 64, 768, Tile(2, 8, 8)),
        (128, 64, 2560, Tile(1, 16, 8)),
        (64, 32, 2560, Tile(1, 16, 4)),
        (256, 256, 1280, Tile(1, 8, 8)),
        (64, 64, 4096, Tile(1, 16, 8)),
        (128, 128, 4096, Tile(1, 8, 4)),
        (256, 256, 4096, Tile(1, 4, 4)),
        (128, 64, 12288, Tile(1, 8, 4)),
        (64, 32, 12288, Tile(1, 16, 4)),
        (128, 64, 2**15, Tile(4, 2, 1)),
        (128, 128, 2**15, Tile(4, 4, 2)),
        (256, 256, 12288, Tile(1, 4, 1)),
        (64, 32, 2**17, Tile(4, 4, 1)),
        (64, 64, 2**17, Tile(4, 4, 1)),
        (80, 40, 2**17, Tile(4, 2, 1)),
    ],
)
def test_rows_by_float32_tables_have_tiles_by_their_elements(
    channels: int, run: int, rows: int, wanted: Tile
) -> None:
    kind = Rows(channels, run, heads=8, wide_tables=True)
    assert tile_for("sm_90", rows, kind) == wanted
    kind = dataclasses.replace(kind, scattered=True)
    assert tile_for("sm_90", rows, kind) == Tile(1, 8, 2)
    assert tile_for("sm_90", 2 * 2**17, kind) == Tile(2, 8, 2)


@pytest.mark.null
def test_few_heads_of_k_and_v_leave_no_tile_half_empty() -> None:
    for count in (2304, 9216, 2**18):
        assert tile_for("sm_90", count, Rows(128, 64, heads=4)) == Tile(2, 4, 2, ahead=True)
        assert tile_for("sm_90", count, Rows(128, 64, heads=8)).heads == 8
    # Of few rows the shape of the tile decides less than how many programs there are.
    assert tile_for("sm_90", 1280, Rows(128, 64, heads=2)) == Tile(1, 8, 4, ahead=True)


@pytest.mark.null
def test_placements_are_timed_in_turn() -> None:
    assert [
        timing.placement_count("cuda", b, t)
        for b, t in ((10**6, 64), (10**6, 256), (10**9, 1), (10**10, 1))
    ] == [4, 1, 2, 1]
    assert timing.placement_count("cpu", 10**6, 64) == 1
    sampler = timing.in_turn([lambda: 1.0, lambda: 3.0])
    assert timing.interleaved({"": sampler}, 40)[""] == timing.Spread(2.0, 1.0, 3.0)


@pytest.mark.cpu
@torch.no_grad()
def test_each_placement_has_buffers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def eager(case: Case, chain: Chain) -> Any:
        def run(*args: Tensor) -> Any:
            seen.add(args[0].data_ptr())
            return chain(*args)

        return run

    monkeypatch.setattr(timing, "placement_count", lambda *_: 3)
    row = measure.measure(small("prelude"), "cpu", [run_of(eager)], 2, 1e4)
    assert row.placements == 3 and row.figures["other"].us is not None
    # One more for the check.
    assert len(seen) >= 3 * row.buffers


@pytest.mark.null
def test_a_program_has_no_more_tokens_than_there_are() -> None:
    assert [Tile(8, 4, 2).within(n).tokens for n in (1, 2, 3, 8, 100)] == [1, 2, 4, 8, 8]


@pytest.mark.null
def test_every_launch_has_a_tile() -> None:
    for channels, run, count in itertools.product(
        (16, 64, 80, 128, 256, 512), (8, 32, 64, 128), ROWS
    ):
        for heads, wide in itertools.product((1, 8), (False, True)):
            tile = tile_for("sm_90", count, Rows(channels, run, heads, wide))
            assert tile.warps in (1, 2, 4, 8)
            assert all(n & (n - 1) == 0 for n in dataclasses.astuple(tile))


@pytest.mark.null
def test_the_tile_of_a_class_is_nearest_to_each_shapes_best() -> None:
    every = [{Tile(1, 1, 1): 2.0, Tile(2, 1, 1): 1.0}, {Tile(1, 1, 1): 1.0, Tile(2, 1, 1): 1.5}]
    assert tune.least_loss(every)[0] == Tile(2, 1, 1)


@pytest.mark.null
@torch.no_grad()
def test_truth_is_float64_and_eager_is_near_it(few_positions: None) -> None:
    case = small("prelude", tokens=64)
    chain = recipes.chain(case, "cpu")
    wanted = check.truth(chain, recipes.draw(case, "cpu", 0))
    assert {x.dtype for x in wanted.outputs} == {torch.float64}
    # bfloat16 keeps 8 bits; eager rounds a handful of times.
    assert 2**-10 < wanted.eager_error < 2**-7


def doubled(chain: Chain) -> Any:
    return lambda *args: 2 * chain(*args)


def careless(chain: Chain) -> Any:
    def run(*args: Tensor) -> Tensor:
        args[-1][:, :, 0] = 0.0
        return chain(*args)

    return run


def forgetful(chain: Chain) -> Any:
    return lambda *args: chain(*args[:-1], args[-1].clone())


def overwriting(chain: Chain) -> Any:
    def run(*args: Tensor) -> Tensor:
        out: Tensor = chain(*args)
        args[0].zero_()
        return out

    return run


def failing(chain: Chain) -> Any:
    raise ImportError("no such kernel")


@pytest.mark.null
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (doubled, "eager's is"),
        (careless, "outside its slots"),
        (forgetful, "not all was written"),
        (overwriting, "an argument was changed"),
        (failing, "ImportError: no such kernel"),
    ],
)
def test_what_is_wrong_is_not_timed(make: Any, reason: str) -> None:
    opponent = run_of(lambda case, chain: make(chain))
    row = measure.measure(small("prelude"), "cpu", [opponent], 1, 1e3)
    figure = row.figures["other"]
    assert figure.us is None and reason in (figure.wrong or "")


@pytest.mark.null
def test_what_is_right_is_timed() -> None:
    row = measure.measure(small("prelude"), "cpu", [run_of(lambda case, chain: chain)], 2, 1e3)
    figure = row.figures["other"]
    assert figure.wrong is None and figure.error == row.eager_error
    assert figure.us is not None and 0 < figure.us.p20 <= figure.us.median <= figure.us.p80


@pytest.mark.null
def test_moved_bytes_are_inputs_outputs_and_written_rows() -> None:
    case = small("prelude")
    d, heads = 128, 4 + 2 + 2
    inputs = recipes.draw(case, "cpu", 0)
    out = torch.empty(1, 4, T, d, dtype=torch.bfloat16)
    tables, slots = 2 * 2 * T * d, 8 * T
    assert inputs.moved_bytes((out,)) == 2 * 2 * T * d * heads + tables + slots


@pytest.mark.cpu
def test_results_survive_json_and_are_plotted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = small("prelude")
    monkeypatch.setattr(recipes, "cases", lambda *_: [case])
    monkeypatch.setattr(timing, "copy_bytes_per_us", lambda _: 1e4)
    target = tmp_path / "rows.json"
    asked = ["bench", "prelude", "--device", "cpu", "--rounds", "2", "--json", str(target)]
    assert cli.main(asked) == 0
    found = rows.read_results(target)
    (row,) = found.rows
    assert row.fusion is not None and row.fusion.whole and row.fusion.providers == ["loops"]
    assert set(row.figures) == {"inductor", "fxfuse"} and row.best() == "inductor"
    ratio = row.derived(found.copy_bytes_per_us)["against_default"]
    assert found.means()["against_default"] == pytest.approx(ratio)
    assert "Qwen3-8B" in capsys.readouterr().out
    again = tmp_path / "again.json"
    found.write(again)
    assert again.read_text() == target.read_text()
    if importlib.util.find_spec("matplotlib") is not None:
        plot.write(found, tmp_path / "rows.png")
        assert (tmp_path / "rows.png").stat().st_size > 0


@pytest.mark.null
@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["bench"],
        ["bench", "sorting"],
        ["bench", "prelude", "--tokens", "0"],
        ["bench", "prelude", "--layout", "flat"],
        ["bench", "prelude", "--opponents", "nobody"],
        ["bench", "prelude", "--shard", "2/2"],
        ["bench", "e2e", "--models", "GPT-1"],
    ],
)
def test_wrong_arguments_are_errors(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(wrong)
    assert error.value.code == 2


@pytest.mark.null
def test_an_opponent_that_is_asked_for_and_absent_is_named() -> None:
    with pytest.raises(SystemExit, match="opponent vllm: "):
        opponents.choose(["vllm"], "prelude", "cpu")


@pytest.mark.null
def test_shards_are_all_rows_once() -> None:
    cases = recipes.cases("prelude", "cuda", None)
    assert len(cases) == 20
    assert sorted(c.tokens for i in range(3) for c in cases[i::3]) == sorted(
        c.tokens for c in cases
    )
