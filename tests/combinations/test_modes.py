"""How a model is compiled and run: modes, dynamic sizes, inference mode, autocast, cache kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

import fxfuse
from tests.models.families import FAMILIES
from tests.models.tiny import assert_close, build, model_of, relative_error, token_ids
from tests.toys import Layer, T, assert_like, by_index_copy, caches, hidden_states

SITES = FAMILIES["qwen3"].rotary
MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

# Seen on 2.11; on a GPU no later torch was tried.
OFFLOADS = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="stock torch 2.11 ends in a segmentation fault here too"
)
NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="transformers offloads from a GPU alone"
)


def fused() -> dict[str, int]:
    return {key: fxfuse.counts()[key] for key in ("attention", "store")}


def fused_since(before: dict[str, int]) -> tuple[int, int]:
    after = fused()
    return after["attention"] - before["attention"], after["store"] - before["store"]


def ran(run: Any, tokens: int = T) -> list[torch.Tensor]:
    memory = caches()
    memory[2] = memory[2][:tokens].clone()
    return [run(hidden_states(tokens), *memory), *memory[:2]]


@pytest.mark.cpu
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_mode(mode: str) -> None:
    layer, before = Layer(by_index_copy), fused()
    got = ran(torch.compile(layer, backend=fxfuse.backend, mode=mode))
    assert fused_since(before) == (1, 1)
    assert_like(got, ran(layer))


@pytest.mark.cpu
@pytest.mark.long
@pytest.mark.parametrize("dynamic", [True, None, False])
@torch.no_grad()
def test_sizes_left_open_or_not(dynamic: bool | None) -> None:
    """One compile; one more at the first change of a length; one for each length."""
    layer, before = Layer(by_index_copy), fused()
    run = torch.compile(layer, backend=fxfuse.backend, dynamic=dynamic)
    for tokens in (5, 4, 3):
        assert_like(ran(run, tokens), ran(layer, tokens))
    graphs = {True: 1, None: 2, False: 3}[dynamic]
    assert fused_since(before) == (graphs, graphs)


@pytest.mark.cpu
@torch.inference_mode()
def test_inference_mode() -> None:
    layer, before = Layer(by_index_copy), fused()
    run = torch.compile(layer, backend=fxfuse.backend)
    got = ran(run)
    assert fused_since(before) == (1, 1) and got[0].is_inference()
    assert_like(got, ran(layer))
    # As torch itself: another state of grad mode is another graph.
    with torch.inference_mode(False), torch.no_grad():
        assert_like(ran(run), ran(layer))


@pytest.mark.null
@torch.inference_mode()
def test_inference_mode_of_a_model() -> None:
    model, ids, before = model_of("qwen3"), token_ids(7), fused()
    run = torch.compile(model, backend=fxfuse.Backend(compiler="aot_eager", strict=True))
    assert_close(run(ids, use_cache=False).logits, model(ids, use_cache=False).logits, "logits")
    assert fused_since(before) == (SITES, 0)


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("aot_eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=[pytest.mark.cpu, pytest.mark.long]),
    ],
)
@pytest.mark.parametrize("name", ["qwen3", pytest.param("gemma3", marks=pytest.mark.long)])
@torch.no_grad()
def test_autocast(name: str, compiler: str) -> None:
    """No further from the float32 model than eager under autocast is, up to half of that."""
    model, ids, before = model_of(name), token_ids(7), fused()
    run = torch.compile(model, backend=fxfuse.Backend(compiler=compiler, strict=True))
    truth = model(ids, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        want = model(ids, use_cache=False).logits
        got = run(ids, use_cache=False).logits
    assert fused_since(before)[0] == FAMILIES[name].rotary
    assert got.dtype == want.dtype
    assert relative_error(got.float(), truth) <= 1.5 * relative_error(want.float(), truth)


@pytest.mark.null
@pytest.mark.parametrize(
    ("name", "kind", "stored"),
    [
        pytest.param("qwen3", "dynamic", False, marks=pytest.mark.long),
        ("qwen3", "static", True),
        pytest.param("gemma3", "dynamic", False, marks=pytest.mark.long),
        pytest.param("gemma3", "static", True, marks=pytest.mark.long),
        *(
            pytest.param("qwen3", kind, stored, marks=[pytest.mark.cuda, NEEDS_CUDA, OFFLOADS])
            for kind, stored in (("offloaded", False), ("offloaded_static", True))
        ),
    ],
)
@torch.no_grad()
def test_generate_with_each_cache(name: str, kind: str, stored: bool) -> None:
    """Greedy tokens are eager's with each cache that transformers makes by name, but the quantised
    one, which wants a library of its own. A cache that grows is fused up to its store.
    """
    device = "cuda" if "offloaded" in kind else "cpu"
    model, prompt = build(FAMILIES[name]).to(device), token_ids(5).to(device)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings |= {"cache_implementation": kind, "attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **settings, disable_compile=True)
    config = CompileConfig(backend=fxfuse.Backend(compiler="aot_eager"))
    config._compile_all_devices = True
    before = fused()
    compiled = build(FAMILIES[name]).to(device)
    if not stored:  # transformers compiles by itself where a cache is static
        compiled.forward = torch.compile(compiled.forward, backend=config.backend)
    got = compiled.generate(prompt, **settings, compile_config=config)
    sites, stores = fused_since(before)
    assert sites >= FAMILIES[name].rotary and (stores > 0) == stored
    assert torch.equal(got, want)
