"""Quantised weights: torchao's tensors and modules that keep integers; sites fuse as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from tests.models.families import FAMILIES
from tests.models.tiny import assert_close, build, relative_error, static_cache, token_ids

SITES = FAMILIES["qwen3"].rotary
ON_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]


class Int8Linear(nn.Module):
    """As bitsandbytes keeps a layer: integers and a scale a row, widened where they are used."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


@torch.library.custom_op("fxfuse_tests::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype)) * scale.flatten().to(x.dtype)


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class OpaqueInt8Linear(Int8Linear):
    """The same by a kernel of its own, which no compiler looks into."""

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale)


def replaced(kind: type[Int8Linear]) -> Callable[[nn.Module], None]:
    def replace(model: nn.Module) -> None:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name != "lm_head":
                    setattr(module, name, kind(child))

    return replace


def by_torchao(make: Callable[[], Any]) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        quantization = pytest.importorskip(
            "torchao.quantization", reason="torchao is not installed"
        )
        quantization.quantize_(model, make())

    return quantise


def int8_weights() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def int4_weights() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


WEIGHTS = {
    "widened": replaced(Int8Linear),
    "by a kernel": replaced(OpaqueInt8Linear),
    "torchao int8": by_torchao(int8_weights),
    "torchao int4": by_torchao(int4_weights),
}


@pytest.mark.parametrize(
    ("device", "compiler"),
    [
        pytest.param("cpu", "eager", marks=pytest.mark.null),
        pytest.param("cpu", "inductor", marks=[pytest.mark.cpu, pytest.mark.long]),
        pytest.param("cuda", "inductor", marks=ON_GPU),
    ],
)
@pytest.mark.parametrize("name", WEIGHTS)
@torch.no_grad()
def test_quantised_weights(name: str, device: str, compiler: str) -> None:
    model: Any = build(FAMILIES["qwen3"]).to(device)
    ids = token_ids(7).to(device)
    plain = model(ids, use_cache=False).logits
    WEIGHTS[name](model)
    want = model(ids, use_cache=False).logits
    assert relative_error(want, plain) > 1e-3
    before = fxfuse.counts()["attention"]
    run = torch.compile(model, backend=fxfuse.Backend(compiler=compiler, strict=True))
    got = run(ids, use_cache=False).logits
    assert fxfuse.counts()["attention"] - before == SITES
    assert_close(got, want, name)


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.null), pytest.param("cuda", marks=ON_GPU)],
)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("widened", "whose weight the graph makes: aten.mul.Tensor"),
        ("by a kernel", "no plain linear: fxfuse_tests.int8_linear.default"),
        ("torchao int8", "whose weight is wrapped: Int8Tensor"),
        ("torchao int4", "whose weight is wrapped: IntxUnpackedToInt8Tensor"),
    ],
)
@torch.no_grad()
def test_quantised_projections_stay_and_say_so(name: str, reason: str, device: str) -> None:
    """A decode step, where projections of plain weights are taken into their sites."""
    model: Any = build(FAMILIES["qwen3"]).to(device)
    WEIGHTS[name](model)
    ids = token_ids(1).to(device)
    want = model(ids, past_key_values=static_cache(model), use_cache=True).logits
    backend = fxfuse.Backend(compiler="eager", gate="always", strict=True)
    run = torch.compile(model, backend=backend)
    got = run(ids, past_key_values=static_cache(model), use_cache=True).logits
    assert_close(got, want, name)
    report = fxfuse.last_report()
    assert report is not None
    sites = [f for f in report.fused if f.kind == "attention"]
    assert len(sites) == SITES and not any(f.record.projected for f in sites)
    refused = [r.reason for r in report.refused if r.stage == "projection"]
    assert len(refused) == SITES and all(reason in r for r in refused)
