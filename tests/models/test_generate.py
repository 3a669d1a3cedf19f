"""How users compile whole models: `generate()`, and one compile for every length and batch."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from transformers import CompileConfig

import fxfuse
from tests.models.counting import GraphCounts
from tests.models.families import FAMILIES
from tests.models.tiny import assert_close, build, model_of, token_ids


def generate_compiled(backend: Any) -> None:
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
    generate_compiled(fxfuse.Backend(compiler="aot_eager"))


@pytest.mark.cpu
def test_generate_with_the_name_of_the_backend() -> None:
    if not entry_points(group="torch_dynamo_backends", name="fxfuse"):
        pytest.skip("the name is known to torch only where fxfuse is installed")
    generate_compiled("fxfuse")


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
