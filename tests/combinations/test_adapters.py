"""PEFT's LoRA on a transformers model: adapters stay outside the sites, which fuse as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.models.families import FAMILIES
from tests.models.tiny import assert_close, build, relative_error, static_cache, token_ids

peft = pytest.importorskip("peft", reason="peft is installed by `make test`")

IDS, SITES = token_ids(7), 1
ON_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]
COMPILERS = pytest.mark.parametrize(
    ("device", "compiler"),
    [
        pytest.param("cpu", "eager", marks=pytest.mark.null),
        pytest.param("cpu", "inductor", marks=[pytest.mark.cpu, pytest.mark.long]),
        pytest.param("cuda", "inductor", marks=ON_GPU),
    ],
)


def plain_model(device: str = "cpu") -> Any:
    return build(FAMILIES["qwen3"], num_hidden_layers=SITES).to(device)


def adapted(*names: str, device: str = "cpu") -> Any:
    """A tiny Qwen3 with an adapter of each name on its projections, none of them without effect."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    model = peft.get_peft_model(plain_model(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval().to(device)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS.to(model.device), use_cache=False).logits


class Compiled:
    """A model compiled by fxfuse; a call says how many sites it had to compile."""

    def __init__(self, model: nn.Module, compiler: str) -> None:
        self.model = torch.compile(model, backend=fxfuse.Backend(compiler=compiler, strict=True))

    def __call__(self) -> tuple[Tensor, int]:
        before = fxfuse.counts()["attention"]
        result = logits(self.model)
        return result, fxfuse.counts()["attention"] - before


@COMPILERS
def test_an_adapter_is_added(device: str, compiler: str) -> None:
    model = adapted("one", device=device)
    want, plain = logits(model), logits(plain_model(device))
    got, sites = Compiled(model, compiler)()
    assert sites == SITES and relative_error(want, plain) > 0.05
    assert_close(got, want, "with an adapter")


@COMPILERS
def test_an_adapter_is_merged_and_taken_out_again(device: str, compiler: str) -> None:
    model = adapted("one", device=device)
    want = logits(model)
    run = Compiled(model, compiler)
    assert_close(run()[0], want, "before")
    model.merge_adapter()
    got, sites = run()
    assert sites == SITES
    assert_close(got, want, "merged")
    model.unmerge_adapter()
    assert_close(run()[0], want, "unmerged")
    torch._dynamo.reset()
    got, sites = Compiled(model.merge_and_unload(), compiler)()
    assert sites == SITES
    assert_close(got, want, "merged and unloaded")


@COMPILERS
def test_adapters_are_swapped(device: str, compiler: str) -> None:
    model = adapted("one", "two", device=device)
    run, wanted = Compiled(model, compiler), []
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        wanted.append(logits(model))
        got, sites = run()
        assert_close(got, wanted[-1], name)
        assert sites in (0, SITES)
    assert relative_error(wanted[0], wanted[1]) > 0.05
    with model.disable_adapter():
        got, sites = run()
        assert sites == SITES
        assert_close(got, logits(model), "no adapter")


@pytest.mark.null
def test_an_adapters_weights_are_swapped_in_place() -> None:
    """diffusers' hotswap: other numbers in the same tensors, and nothing is compiled anew."""
    model = adapted("one")
    run = Compiled(model, "eager")
    first, sites = run()
    assert sites == SITES
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.mul_(-2)
    got, sites = run()
    assert sites == 0 and relative_error(got, first) > 0.05
    assert_close(got, logits(model), "swapped in place")


@pytest.mark.null
def test_an_adapter_is_trained() -> None:
    """Only the adapter's weights want gradients: they are eager's."""
    model = adapted("one")

    def gradients(run: Any) -> dict[str, Tensor]:
        model.zero_grad()
        run(IDS, use_cache=False).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients(model)
    before = fxfuse.counts()["attention"]
    got = gradients(torch.compile(model, backend=fxfuse.Backend(compiler="aot_eager")))
    assert fxfuse.counts()["attention"] - before == SITES
    assert want.keys() == got.keys() and all("lora_" in name for name in want)
    for name, gradient in want.items():
        # float32: two orders of sums differ by rounding.
        assert_close(got[name], gradient, name, tolerance=1e-5)


@COMPILERS
@torch.no_grad()
def test_a_projection_with_an_adapter_stays_and_says_so(device: str, compiler: str) -> None:
    """A decode step, where projections of plain weights are taken into their sites: so is one that
    an adapter was merged into.
    """
    model, ids = adapted("one", device=device), token_ids(1).to(device)

    def logits(run: Any) -> Tensor:
        cache = static_cache(model.get_base_model())
        return run(input_ids=ids, past_key_values=cache, use_cache=True).logits

    want = logits(model)
    backend = fxfuse.Backend(compiler=compiler, gate="always", strict=True)
    compiled = torch.compile(model, backend=backend)
    projected = []
    for reasons in (["a projection that is no plain linear: aten.add.Tensor"], []):
        assert_close(logits(compiled), want, "with its adapter")
        report = fxfuse.last_report()
        assert report is not None
        assert [r.reason for r in report.refused if r.stage == "projection"] == reasons
        projected += [f.record.projected for f in report.fused if f.kind == "attention"]
        model.merge_adapter()
    assert projected == [False, True]
