"""bfloat16 models: fxfuse may not be further from the truth than eager and stock Inductor are.

The truth is the same weights in float64, or float32 where an op knows no float64. A fused chain
rounds less often than eager, so "equal to eager" would be the wrong test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.models.families import FAMILIES
from tests.models.tiny import PROMPT, build, token_ids

pytestmark = pytest.mark.cpu
INPUTS = [token_ids(PROMPT, seed=100 + number) for number in range(8)]


def logits(model: Any) -> Tensor:
    return torch.cat([model(ids, use_cache=False).logits.double() for ids in INPUTS])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "qwen3" else [pytest.mark.long]) for name in FAMILIES],
)
def test_no_less_exact_than_the_better_known_two(name: str) -> None:
    family = FAMILIES[name]
    exact = torch.float64 if family.knows_float64 else torch.float32
    truth = logits(build(family, torch.bfloat16).to(exact))
    model = build(family, torch.bfloat16)

    def rms_error(run: Any) -> float:
        return float((logits(run) - truth).square().mean().sqrt())

    eager = rms_error(model)
    stock = rms_error(torch.compile(model, backend="inductor"))
    torch._dynamo.reset()
    before = fxfuse.counts().get("attention", 0)
    fused = rms_error(torch.compile(model, backend=fxfuse.Backend()))
    assert fxfuse.counts()["attention"] - before == family.rotary
    # 5 %: rounding errors of two orders of the same sums differ by about that much over eight
    # inputs.
    assert 0 < fused <= 1.05 * max(eager, stock), f"{fused=:.3e} {eager=:.3e} {stock=:.3e}"
