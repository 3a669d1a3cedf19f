"""`torch.export`, `fxfuse.fuse`, AOTInductor: the package runs where fxfuse cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import fxfuse
from tests.blocked import without
from tests.models.families import FAMILIES
from tests.models.tiny import assert_close, build, token_ids
from tests.spellings import Rope, gemma, llama4, rsqrt, unit_circle
from tests.toys import Attention, Layer, T, assert_like, by_index_copy, caches, hidden_states

RUN_A_PACKAGE = """
import torch
run = torch._inductor.aoti_load_package(sys.argv[1])
inputs = torch.load(sys.argv[2])
results = [run(*given) for given in inputs]
assert "fxfuse" not in sys.modules
torch.save(results, sys.argv[3])
"""


class Logits(nn.Module):
    """A transformers model as a function of token ids alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = build(FAMILIES[name], num_hidden_layers=2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@torch.no_grad()
def fused(program: ExportedProgram, **settings: Any) -> tuple[ExportedProgram, fxfuse.Report]:
    program = fxfuse.fuse(program, **settings)
    report = fxfuse.last_report()
    assert report is not None
    return program, report


@torch.no_grad()
def exported(module: nn.Module, *args: Any, **kwargs: Any) -> ExportedProgram:
    return export(module, args, **kwargs)


def ops(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if "fxfuse" in str(n.target)]


def sites(report: fxfuse.Report) -> int:
    """Attention layers whose rotation is fused."""
    return sum(f.kind == "attention" for f in report.fused)


def run_elsewhere(package: str, inputs: list[tuple[Any, ...]], folder: Path) -> list[Any]:
    """What a package gives in a process that has no fxfuse."""
    torch.save(inputs, folder / "inputs")
    command = [
        sys.executable,
        "-c",
        without("fxfuse") + RUN_A_PACKAGE,
        package,
        folder / "inputs",
        folder / "results",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results")


def packaged(program: ExportedProgram, folder: Path) -> str:
    path = str(folder / "model.pt2")
    return torch._inductor.aoti_compile_and_package(program, package_path=path)


# --- the program -------------------------------------------------------------------------------


@pytest.mark.null
@pytest.mark.parametrize(
    "toy",
    [
        Attention(),
        Attention(norm=rsqrt),
        Attention(norm=gemma, after=True),
        Attention(Rope(llama4, unit_circle), norm=rsqrt),
        Attention(norm=rsqrt, packing="slices"),
        Attention(norm=rsqrt, wide=True),
    ],
    ids=["rope", "norm", "after", "complex", "packed", "wide"],
)
def test_a_program_is_fused_and_runs_as_it_did(toy: Attention) -> None:
    x = hidden_states()
    program = exported(toy, x)
    before = str(program.graph)
    new, report = fused(program)
    assert [f.op for f in report.fused] == ["fxfuse::norm_rope"] and report.refused == []
    assert ops(new) == ["fxfuse.norm_rope.default"] and str(program.graph) == before
    assert_like(new.module()(x), toy(x))


@pytest.mark.null
def test_a_store_is_in_the_site() -> None:
    layer = Layer(by_index_copy)
    want, got = caches(), caches()
    program, report = fused(exported(layer, hidden_states(T), *caches()))
    assert ops(program) == ["fxfuse.norm_rope_store_.default"]
    assert "store(k,v)" in report.fused[0].stages
    with torch.no_grad():
        assert_like(program.module()(hidden_states(T), *got), layer(hidden_states(T), *want))
    assert_like(got, want)


@pytest.mark.null
def test_sizes_that_are_left_open_stay_open() -> None:
    toy = Attention(norm=rsqrt)
    open_sizes = ({0: Dim("batch"), 1: Dim("tokens", min=2, max=64)},)
    program, report = fused(exported(toy, hidden_states(), dynamic_shapes=open_sizes))
    assert len(report.fused) == 1 and len(program.range_constraints) == 2
    for tokens, batch in [(5, 2), (9, 3), (2, 4)]:
        x = hidden_states(tokens, batch)
        assert_like(program.module()(x), toy(x))


@pytest.mark.null
def test_what_the_program_returns_stays_an_output() -> None:
    layer = Layer(lambda q, k, v: (q, k))
    program, report = fused(exported(layer, hidden_states(T)))
    assert len(report.fused) == 1
    assert_like(program.module()(hidden_states(T)), layer(hidden_states(T)))


@pytest.mark.null
def test_a_saved_program_is_read_again(tmp_path: Path) -> None:
    toy, x = Attention(norm=rsqrt), hidden_states()
    torch.export.save(exported(toy, x), tmp_path / "plain.pt2")
    program, report = fused(torch.export.load(tmp_path / "plain.pt2"))
    assert len(report.fused) == 1
    torch.export.save(program, tmp_path / "fused.pt2")
    again = torch.export.load(tmp_path / "fused.pt2")
    assert ops(again) == ["fxfuse.norm_rope.default"]
    assert_like(again.module()(x), toy(x))


@pytest.mark.null
@pytest.mark.parametrize("first", ["decomposed", "fused"])
def test_a_program_is_decomposed_before_or_after(first: str) -> None:
    """Decomposed, a program writes to nothing: its stores are results, and stay the program's."""
    layer = Layer(by_index_copy)
    program = exported(layer, hidden_states(T), *caches())
    if first == "decomposed":
        program = fused(program.run_decompositions())[0]
        assert ops(program) == ["fxfuse.norm_rope.default"]
    else:
        program = fused(program)[0].run_decompositions()
        assert "norm_rope_store_" in str(program.graph)
    want, got = caches(), caches()
    with torch.no_grad():
        assert_like(program.module()(hidden_states(T), *got), layer(hidden_states(T), *want))
    assert_like(got, want)


@pytest.mark.null
def test_nothing_to_fuse_is_the_program_itself() -> None:
    program = exported(nn.Linear(32, 8), hidden_states())
    assert fused(program)[0] is program
    program = exported(Attention(), hidden_states())
    new, report = fused(program, disable=("attention",))
    assert new is program and report.notes == ["disabled by settings"]


@pytest.mark.null
def test_gradients_are_needed_where_nobody_said_otherwise() -> None:
    program = export(Layer(by_index_copy), (hidden_states(T), *caches()))
    new = fxfuse.fuse(program)
    assert ops(new) == ["fxfuse.norm_rope.default"]
    report = fxfuse.last_report()
    assert report is not None and "cache writes stay the model's" in report.notes[0]


@pytest.mark.null
@pytest.mark.parametrize(
    "name",
    ["qwen3", *(pytest.param(x, marks=pytest.mark.long) for x in ("gemma3", "olmo2", "phi3"))],
)
def test_a_model_of_transformers(name: str) -> None:
    model, ids = Logits(name), token_ids(7)
    program, report = fused(exported(model, ids))
    assert len(ops(program)) == sites(report) == FAMILIES[name].rotary
    with torch.no_grad():
        assert_close(program.module()(ids), model(ids), name)


@pytest.mark.null
def test_a_model_exported_with_gradients() -> None:
    """The tables of transformers are made without them, in a region of the program's own."""
    model, ids = Logits("qwen3"), token_ids(7)
    program = export(model, (ids,))
    assert "wrap_with_set_grad_enabled" in str(program.graph)
    new, report = fused(program)
    assert len(ops(new)) == sites(report) == FAMILIES["qwen3"].rotary
    with torch.no_grad():
        assert_close(new.module()(ids), model(ids), "logits")
    # Where its gradients are asked for, they are the program's.
    new = fxfuse.fuse(program)
    report = fxfuse.last_report()
    assert report is not None and "under torch.no_grad()" in report.notes[-1]
    want, got = (
        torch.autograd.grad(p.module()(ids).square().mean(), list(p.module().parameters()))
        for p in (program, new)
    )
    assert_like(list(got), list(want))


@pytest.mark.null
def test_a_region_without_gradients_that_gives_two_results() -> None:
    class Region(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                first, second = x + 1, x * 2
            return toy(x + second), first

    toy = Attention(norm=rsqrt)
    module = Region()
    module.toy = toy
    new, report = fused(export(module, (hidden_states(),)))
    assert len(report.fused) == 1
    assert_like(new.module()(hidden_states()), module(hidden_states()))


# --- AOTInductor -------------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.long
def test_a_package_runs_where_fxfuse_is_not_installed(tmp_path: Path) -> None:
    model = Logits("qwen3")
    tokens = Dim("tokens", min=2, max=64)
    program, report = fused(exported(model, token_ids(7), dynamic_shapes=({1: tokens},)))
    assert sites(report) == 2
    inputs = [(token_ids(7),), (token_ids(11),)]
    for got, given in zip(
        run_elsewhere(packaged(program, tmp_path), inputs, tmp_path), inputs, strict=True
    ):
        with torch.no_grad():
            assert_close(got, model(*given), "logits")


@pytest.mark.cpu
@pytest.mark.long
def test_a_decoder_with_its_cache_inside(tmp_path: Path) -> None:
    """transformers' own recipe: the static cache is buffers, a call is one token."""
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    model = build(FAMILIES["qwen3"])
    model.generation_config.cache_implementation = "static"
    model.generation_config.use_cache = True

    def decoder() -> nn.Module:
        with torch.no_grad():
            return TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=16)

    inputs: list[Any] = [
        (token_ids(1, seed, batch=1), None, torch.tensor([seed])) for seed in range(5)
    ]
    program, report = fused(exported(decoder(), *inputs[0], strict=True))
    ours = [f.op for f in report.fused if f.kind == "attention"]
    assert ours == ["fxfuse::norm_rope_store_"] * 2
    eager = decoder()
    for got, given in zip(
        run_elsewhere(packaged(program, tmp_path), inputs, tmp_path), inputs, strict=True
    ):
        with torch.no_grad():
            assert_close(got, eager(*given), "logits")
