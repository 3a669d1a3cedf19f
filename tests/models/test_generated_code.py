"""The C++ Inductor generates for a decode step of Qwen3: what is allocated, what is written."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch._inductor.utils import fresh_cache, run_and_get_code

import fxfuse
from tests.models.families import FAMILIES
from tests.models.tiny import BATCH, build, static_cache, token_ids

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 8, 2, 48, 64


def decode_step(backend: object) -> str:
    """The generated module of one token's forward through one layer."""
    torch._dynamo.reset()
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    model = build(FAMILIES["qwen3"], num_hidden_layers=1, **sizes)
    with torch.no_grad(), fresh_cache():
        cache = static_cache(model, slots=SLOTS)
        model(token_ids(5), past_key_values=cache)
        step = torch.compile(model, backend=backend)
        _, [code] = run_and_get_code(step, token_ids(1), past_key_values=cache)
    return code


def allocated(code: str) -> list[tuple[int, ...]]:
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    return [tuple(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]


@pytest.mark.cpu
def test_a_decode_step_writes_q_and_k_once_and_copies_no_cache() -> None:
    stock, fused = decode_step("inductor"), decode_step(fxfuse.Backend(strict=True))
    assert "norm_rope_store" in fused and "norm_rope_store" not in stock
    cache = BATCH * KV_HEADS * SLOTS * HEAD_DIM

    def of_cache_size(code: str) -> list[tuple[int, ...]]:
        return sorted(shape for shape in allocated(code) if math.prod(shape) >= cache)

    # transformers expands K and V to all heads behind the store; what is fused reads the caches.
    assert len(of_cache_size(stock)) == 2 and of_cache_size(fused) == []
    # q has one buffer; k has none, its row goes straight into the cache.
    assert allocated(fused).count((BATCH, HEADS, 1, HEAD_DIM)) == 1
    assert (BATCH, KV_HEADS, 1, HEAD_DIM) not in allocated(fused)
