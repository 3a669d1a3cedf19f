"""A static sliding-window cache while it grows, as it fills, and when it is full.

Each phase is another store: `index_copy_` while tokens fit, a copy of the last slots when a
prompt is longer than the window, and roll, `index_put_`, `copy_` for every token after that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import fxfuse
from tests.models.families import FAMILIES
from tests.models.tiny import (
    assert_close,
    assert_same_cache,
    build,
    static_cache,
    token_ids,
)

pytestmark = pytest.mark.null
WINDOW = 8


def chat(*lengths: int) -> list[torch.Tensor]:
    return [token_ids(tokens, seed=20 + call) for call, tokens in enumerate(lengths)]


CHATS = {
    # Six tokens, then one by one: the window is full after the second of them.
    "grows_past_the_window": chat(6, 1, 1, 1, 1, 1, 1),
    "prompt_longer_than_the_window": chat(11, 1, 1),
    "prompt_fills_it_exactly": chat(WINDOW, 1, 1),
    "second_prompt_when_full": chat(6, 5, 1, 4),
}


def run(model: Any, kv: Any, calls: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(ids, past_key_values=kv, use_cache=True).logits for ids in calls]


@pytest.mark.parametrize("name", ["gemma3", pytest.param("gpt_oss", marks=pytest.mark.long)])
@pytest.mark.parametrize("calls", CHATS.values(), ids=CHATS.keys())
def test_every_phase_is_right(name: str, calls: list[torch.Tensor]) -> None:
    model = build(FAMILIES[name], sliding_window=WINDOW)
    want_kv, got_kv = static_cache(model), static_cache(model)
    before = fxfuse.counts().get("attention", 0)
    compiled = torch.compile(model, backend=fxfuse.Backend(compiler="aot_eager"))
    pairs = zip(run(compiled, got_kv, calls), run(model, want_kv, calls), strict=True)
    for call, (got, want) in enumerate(pairs):
        assert_close(got, want, f"logits of call {call}")
    assert_same_cache(got_kv, want_kv, "at the end")
    # Every graph rotates in both layers; there are at least two: the first prompt and the first
    # token.
    fused = fxfuse.counts()["attention"] - before
    assert fused >= 2 * FAMILIES[name].rotary and fused % FAMILIES[name].rotary == 0


def test_the_sliding_layer_really_is_full() -> None:
    """The tests above are about a cache with `WINDOW` slots beside one with more."""
    kv = static_cache(build(FAMILIES["gemma3"], sliding_window=WINDOW))
    assert [type(layer) for layer in kv.layers] == [
        transformers.cache_utils.StaticSlidingWindowLayer,
        transformers.cache_utils.StaticLayer,
    ]
    assert kv.layers[0].keys.shape[2] == WINDOW < kv.layers[1].keys.shape[2]
