"""Every family, eager against compiled, with the exact number of sites that must be fused.

The pass and its ops are the same whatever compiles the graph afterwards, so all families run
through `compiler="aot_eager"`, and one with a static cache through Inductor, whose C++ takes
half a minute a graph; everything else through Inductor is in `make test-long`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fxfuse
from tests.models.counting import GraphCounts
from tests.models.families import FAMILIES, Family
from tests.models.tiny import (
    PROMPT,
    assert_close,
    assert_same_cache,
    model_of,
    static_cache,
    token_ids,
)

STEPS = 3


def families(*, quick_through_inductor: bool) -> Any:
    """Each family under both compilers; Inductor is long, but for one where it may be quick."""
    for name, family in FAMILIES.items():
        yield pytest.param(family, "aot_eager", id=f"{name}-aot_eager", marks=pytest.mark.null)
        quick = quick_through_inductor and family.through_inductor
        marks = [pytest.mark.cpu] if quick else [pytest.mark.cpu, pytest.mark.long]
        yield pytest.param(family, "inductor", id=f"{name}-inductor", marks=marks)


@cache
def eager_forward(name: str) -> Tensor:
    return model_of(name)(token_ids(PROMPT), use_cache=False).logits


@cache
def eager_static(name: str) -> tuple[list[Tensor], Any]:
    """Logits of the prompt and of each decoded token, and the cache after them."""
    model = model_of(name)
    kv = static_cache(model)
    return [model(ids, past_key_values=kv, use_cache=True).logits for ids in chat()], kv


def chat() -> list[Tensor]:
    return [token_ids(PROMPT), *(token_ids(1, seed=10 + step) for step in range(STEPS))]


@pytest.mark.parametrize(("family", "compiler"), families(quick_through_inductor=False))
def test_forward_without_cache(family: Family, compiler: str) -> None:
    backend = GraphCounts(compiler)
    model = torch.compile(model_of(family.name), backend=backend)
    with backend.expect(family.rotary, stored=0):
        logits = model(token_ids(PROMPT), use_cache=False).logits
    assert backend.graphs == 1
    assert_close(logits, eager_forward(family.name), "logits")


@pytest.mark.parametrize(("family", "compiler"), families(quick_through_inductor=True))
def test_static_cache_prefill_and_decode(family: Family, compiler: str) -> None:
    backend = GraphCounts(compiler)
    model = torch.compile(model_of(family.name), backend=backend)
    kv = static_cache(model_of(family.name))
    want_logits, want_kv = eager_static(family.name)
    for call, (ids, want) in enumerate(zip(chat(), want_logits, strict=True)):
        graphs = backend.graphs
        with backend.expect(family.rotary, family.stored):
            logits = model(ids, past_key_values=kv, use_cache=True).logits
        # One graph for the prompt, one for every token after it, though a sliding layer's length
        # is a Python int.
        assert backend.graphs - graphs == (1 if call < 2 else 0)
        assert_close(logits, want, f"logits of call {call}")
    assert_same_cache(kv, want_kv, "after decoding")


# Layers whose attention reads heads that are repeated in front of it; the others have a head of k
# for each of q, or attention of their own.
REPEATED = {"llama": 2, "gemma3": 2, "phi3": 2, "cohere2": 3, "llama4": 3, "olmo2": 0, "gpt_oss": 0}


@pytest.mark.null
@pytest.mark.parametrize("name", REPEATED)
def test_attention_reads_heads_as_they_are_cached(name: str) -> None:
    model = model_of(name)
    kv, other = (static_cache(model) for _ in range(2))
    for given in (kv, other):
        model(token_ids(PROMPT), past_key_values=given, use_cache=True)
    backend = fxfuse.Backend(compiler="eager")
    got = torch.compile(model, backend=backend)(token_ids(1), past_key_values=kv).logits
    assert_close(got, model(token_ids(1), past_key_values=other).logits, "logits")
    kinds = [f.kind for f in fxfuse.last_report().fused]
    assert kinds.count("grouped_heads") == REPEATED[name]


@pytest.mark.null
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_dynamic_cache_is_fused_up_to_the_store(name: str) -> None:
    eager, backend = model_of(name), GraphCounts("aot_eager")
    compiled = torch.compile(eager, backend=backend)
    caches = [transformers.DynamicCache(config=eager.config) for _ in range(2)]
    for call, ids in enumerate(chat()):
        want = eager(ids, past_key_values=caches[0], use_cache=True).logits
        with backend.expect(FAMILIES[name].rotary, stored=0):
            got = compiled(ids, past_key_values=caches[1], use_cache=True).logits
        assert_close(got, want, f"logits of call {call}")
    assert backend.graphs > 0
    assert_same_cache(caches[1], caches[0], "after decoding")


@pytest.mark.null
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "glm4"])
def test_left_padding(name: str) -> None:
    """The first row has three tokens of padding: other positions in every row, and a mask."""
    eager, backend = model_of(name), GraphCounts("aot_eager")
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[0, :3] = 0
    call = {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "use_cache": True,
    }
    caches = [static_cache(eager) for _ in range(2)]
    want = eager(token_ids(PROMPT), past_key_values=caches[0], **call).logits
    with backend.expect(FAMILIES[name].rotary, FAMILIES[name].stored):
        got = torch.compile(eager, backend=backend)(
            token_ids(PROMPT), past_key_values=caches[1], **call
        ).logits
    assert backend.graphs == 1
    assert_close(got[mask.bool()], want[mask.bool()], "logits of real tokens")
    assert_same_cache(caches[1], caches[0], "after the prompt")


@pytest.mark.null
@pytest.mark.parametrize("name", ["olmo2", "gptj", "llama4"])
def test_positions_given_by_the_user(name: str) -> None:
    """Positions that are neither in order nor the same in both rows."""
    eager, backend = model_of(name), GraphCounts("aot_eager")
    positions = torch.tensor([[5, 3, 40, 0, 7, 7, 100], [9, 8, 7, 6, 5, 4, 3]])
    call = {"position_ids": positions, "use_cache": False}
    want = eager(token_ids(PROMPT), **call).logits
    with backend.expect(FAMILIES[name].rotary, stored=0):
        got = torch.compile(eager, backend=backend)(token_ids(PROMPT), **call).logits
    assert backend.graphs == 1
    assert_close(got, want, "logits")


@pytest.mark.null
def test_a_cache_allocated_inside_the_graph() -> None:
    """The first call of a StaticCache allocates its memory; compiled, that happens in the graph."""
    eager = model_of("qwen3")
    caches = [transformers.StaticCache(config=eager.config, max_cache_len=16) for _ in range(2)]
    want = eager(token_ids(PROMPT), past_key_values=caches[0], use_cache=True).logits
    before = fxfuse.counts().get("attention", 0)
    model = torch.compile(eager, backend=fxfuse.Backend(compiler="aot_eager"))
    got = model(token_ids(PROMPT), past_key_values=caches[1], use_cache=True).logits
    assert fxfuse.counts()["attention"] - before == FAMILIES["qwen3"].rotary
    assert_close(got, want, "logits")
    assert_same_cache(caches[1], caches[0], "after the prompt")
