"""How users compile whole models: `generate()`, and one compile for every length and batch."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache

import fxfuse
from tests.models.counting import GraphCounts
from tests.models.families import FAMILIES
from tests.models.tiny import assert_close, build, model_of, token_ids


def assert_generates_as_eager(backend: Any) -> None:
    """Greedy tokens with a static cache and a compiled decode equal eager's."""
    model = model_of("qwen3")
    prompt = token_ids(5)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **settings)
    config = CompileConfig(backend=backend)
    # transformers compiles on accelerators only, unless this is set.
    config._compile_all_devices = True
    before = fxfuse.counts().get("attention", 0)
    settings |= {"cache_implementation": "static", "compile_config": config}
    got = build(FAMILIES["qwen3"]).generate(prompt, **settings)
    assert fxfuse.counts()["attention"] - before >= FAMILIES["qwen3"].rotary
    assert torch.equal(got, want)


@pytest.mark.null
def test_generate_with_a_configured_backend() -> None:
    """transformers copies the backend deeply and hands it a mode."""
    assert_generates_as_eager(fxfuse.Backend(compiler="aot_eager"))


@pytest.mark.cpu
def test_generate_with_the_name_of_the_backend() -> None:
    if not entry_points(group="torch_dynamo_backends", name="fxfuse"):
        pytest.skip("the name is known to torch only where fxfuse is installed")
    assert_generates_as_eager("fxfuse")


@pytest.mark.null
@pytest.mark.parametrize("name", ["llama", "qwen3", "glm4"])
def test_one_compile_for_every_length(name: str) -> None:
    model, backend = model_of(name), GraphCounts("aot_eager")
    compiled = torch.compile(model, backend=backend)
    before = fxfuse.counts().get("attention", 0)
    for tokens in range(2, 18):
        ids = token_ids(tokens)
        torch._dynamo.mark_dynamic(ids, 1)
        got = compiled(ids, use_cache=False).logits
        assert_close(got, model(ids, use_cache=False).logits, f"{tokens} tokens")
    assert backend.graphs == 1
    assert fxfuse.counts()["attention"] - before == FAMILIES[name].rotary


@pytest.mark.null
def test_one_compile_for_every_batch_and_length() -> None:
    model, backend = model_of("qwen3"), GraphCounts("aot_eager")
    compiled = torch.compile(model, backend=backend)
    before = fxfuse.counts().get("attention", 0)
    for batch, tokens in [(2, 5), (3, 9), (7, 2), (4, 4)]:
        ids = token_ids(tokens, batch=batch)
        torch._dynamo.mark_dynamic(ids, 0)
        torch._dynamo.mark_dynamic(ids, 1)
        got = compiled(ids, use_cache=False).logits
        assert_close(got, model(ids, use_cache=False).logits, f"{batch} x {tokens} tokens")
    assert backend.graphs == 1
    assert fxfuse.counts()["attention"] - before == FAMILIES["qwen3"].rotary


def generated_in_one_batch(backend: Any) -> list[list[int]]:
    """Greedy tokens of two prompts, by transformers' continuous batching with its paged cache."""
    compiled = CompileConfig(backend=backend, mode=None, fullgraph=False, dynamic=None)
    settings = {"num_blocks": 16, "page_size": 32, "max_batch_tokens": 64}
    config = ContinuousBatchingConfig(
        varlen_compile_config=compiled if backend else None, use_cuda_graph=False, **settings
    )
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = build(FAMILIES["qwen3"]).generate_batch(
        [[5, 6, 7, 8, 9], [11, 12, 13]],
        generation_config=greedy,
        continuous_batching_config=config,
        progress_bar=False,
    )
    return [outputs[name].generated_tokens for name in sorted(outputs)]


@pytest.mark.null
@pytest.mark.parametrize("traced", [False, True], ids=["as it is", "its cache's update traced"])
def test_continuous_batching(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps the compiler out of the paged cache's update: a site ends before it, and
    the layers share one compiled attention. Where the update is traced, the store is in the site.
    """
    want = generated_in_one_batch(None)
    if traced:
        update = PagedAttentionCache.update._torchdynamo_orig_callable
        monkeypatch.setattr(PagedAttentionCache, "update", update)
    torch._dynamo.reset()
    before = fxfuse.counts()
    assert generated_in_one_batch(fxfuse.Backend(compiler="eager")) == want
    after = fxfuse.counts()
    fused = {key: after[key] - before[key] for key in ("attention", "store")}
    assert fused["attention"] >= (FAMILIES["qwen3"].rotary if traced else 1)
    assert fused["store"] == (fused["attention"] if traced else 0)
