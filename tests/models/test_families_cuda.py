"""Every family on a GPU: prefill and decode with a static cache, through the Triton kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxfuse
from tests.models.families import FAMILIES
from tests.models.tiny import PROMPT, SLOTS, build, relative_error, token_ids

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_decode_equal_eager(name: str) -> None:
    from transformers import StaticCache

    family = FAMILIES[name]
    model = build(family).cuda()
    compiled = torch.compile(model, backend=fxfuse.Backend(strict=True))
    want_cache, got_cache = (StaticCache(config=model.config, max_cache_len=SLOTS) for _ in "wg")
    for step, tokens in enumerate((7, 1, 1, 1)):
        ids = token_ids(tokens, seed=step).cuda()
        want = model(ids, past_key_values=want_cache).logits
        got = compiled(ids, past_key_values=got_cache).logits
        # float32 on both sides: what differs is the order of sums.
        assert relative_error(got, want) < 1e-4
    report = fxfuse.last_report()
    sites = [site for site in report.fused if site.kind == "attention"]
    assert len(sites) == family.rotary
    assert {site.provider for site in sites} == {"triton"}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_as_exact_as_eager_or_stock(name: str) -> None:
    family = FAMILIES[name]
    inputs = [token_ids(PROMPT, seed=100 + number).cuda() for number in range(8)]

    def logits(run: Any) -> torch.Tensor:
        return torch.cat([run(ids, use_cache=False).logits.double() for ids in inputs])

    exact = torch.float64 if family.knows_float64 else torch.float32
    truth = logits(build(family, torch.bfloat16).to(exact).cuda())
    model = build(family, torch.bfloat16).cuda()
    rms = {}
    for who, backend in (("eager", "eager"), ("stock", "inductor"), ("fused", fxfuse.Backend())):
        torch._dynamo.reset()
        difference = logits(torch.compile(model, backend=backend)) - truth
        rms[who] = float(difference.square().mean().sqrt())
    assert 0 < rms["fused"] <= 1.05 * max(rms["eager"], rms["stock"]), rms
