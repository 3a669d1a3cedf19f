"""diffusers' own ways to compile; they need diffusers, which `make sweep` installs."""

from __future__ import annotations

import pytest
import torch

import fxfuse
from tests.models.tiny import assert_close, randomise

pytest.importorskip("diffusers", reason="diffusers is installed by `make sweep`")

from fxfuse.tiny.diffusion import diffusers_inputs, diffusers_model, diffusers_units


@pytest.mark.parametrize(
    ("name", "compiler"),
    [
        *(pytest.param(x, "eager", marks=pytest.mark.null) for x in ("flux", "qwenimage", "wan")),
        pytest.param("flux", "inductor", marks=[pytest.mark.cpu, pytest.mark.long]),
    ],
)
def test_compile_repeated_blocks(name: str, compiler: str) -> None:
    """Each kind of block is compiled once and serves all of its layers."""
    unit = diffusers_units()[f"diffusers/{name}"]
    model, inputs = randomise(diffusers_model(unit).eval()), diffusers_inputs(unit.name)
    with torch.no_grad():
        want = model(**inputs, return_dict=False)[0]
        torch._dynamo.reset()
        before = fxfuse.counts()["attention"]
        model.compile_repeated_blocks(backend=fxfuse.Backend(compiler=compiler), fullgraph=True)
        got = model(**inputs, return_dict=False)[0]
    assert_close(got, want, name)
    assert fxfuse.counts()["attention"] > before
