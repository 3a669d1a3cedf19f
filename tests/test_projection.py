"""The projection in front of a site: found in every packing, refused with its reason, the same
numbers; through the reference here, through Inductor below, on a GPU in test_projection_cuda.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.lowering import gate
from fxfuse.patterns.projection import MAX_ROWS
from tests.models.families import FAMILIES
from tests.models.tiny import build, static_cache, token_ids
from tests.sites import NORM, cached, site, with_dtype
from tests.test_slots import KeyIsValue, NormedV, ReadV
from tests.toys import Layer, assert_like, by_index_copy, caches, hidden_states

pytestmark = pytest.mark.null

PACKINGS = ("separate", "by head", "one view", "slices")


@torch.no_grad()
def run(layer: nn.Module, *args: Any, compiler: Any = "eager", **settings: Any) -> fxfuse.Report:
    """The report of a compile whose results and caches are eager's."""
    torch._dynamo.reset()
    copies = copy.deepcopy(args)
    want = layer(*copies)
    backend = fxfuse.Backend(compiler=compiler, **{"gate": "always", **settings})
    got = torch.compile(layer, backend=backend)(*args)
    assert_like(got, want)
    assert_like(args, copies)
    report = fxfuse.last_report()
    assert report is not None
    return report


def projected(report: fxfuse.Report) -> bool:
    (fused,) = (f for f in report.fused if f.kind == "attention")
    assert fused.record.projected == (fused.op == "fxfuse::project_norm_rope_store_")
    return "projection" in fused.stages


def reasons(report: fxfuse.Report) -> list[str]:
    return [r.reason for r in report.refused if r.stage == "projection"]


def layer(packing: str = "separate", bias: bool = False) -> Layer:
    sizes = {"by head": {"heads": 2, "kv_heads": 2}}.get(packing, {})
    from tests.toys import Sizes

    toy = Layer(by_index_copy, packing=packing, sizes=Sizes(**sizes))
    if bias:
        toy.project.bias = nn.Parameter(torch.randn(toy.project.out_features))
    return toy


# --- found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_packing_is_a_projection(packing: str, bias: bool) -> None:
    report = run(layer(packing, bias), hidden_states(), *caches())
    # Of "separate" toys the bias is not used.
    assert projected(report) and reasons(report) == []
    assert str(report).count("projection + rms_norm + rope + store(k,v)") == 1


@pytest.mark.parametrize("toy", [NormedV, KeyIsValue])
def test_a_normed_v_is_projected_with_the_others(toy: type[NormedV]) -> None:
    report = run(toy(by_index_copy), hidden_states(), *caches())
    assert projected(report) and reasons(report) == []


def test_a_product_whose_normed_v_no_site_takes_is_read_by_others() -> None:
    report = run(KeyIsValue(by_index_copy, eps=1e-3), hidden_states(), *caches())
    assert not projected(report)
    assert [reason.split(":")[0] for reason in reasons(report)] == [
        "a projection that others read too"
    ]


def test_a_product_whose_normed_v_others_read_is_the_compilers() -> None:
    report = run(ReadV(by_index_copy), hidden_states(), *caches())
    assert not projected(report)
    assert reasons(report) == ["a projection that others read too: aten.mul.Tensor"]


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "gpt_neox", "phi3"])
@torch.no_grad()
def test_real_models_decode_by_projections(name: str) -> None:
    family = FAMILIES[name]
    model = build(family)
    backend = fxfuse.Backend(compiler="eager", gate="always", strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    want_cache, got_cache = static_cache(model), static_cache(model)
    model(token_ids(7), past_key_values=want_cache, use_cache=True)
    model(token_ids(7), past_key_values=got_cache, use_cache=True)
    for step in range(3):
        ids = token_ids(1, seed=step)
        want = model(ids, past_key_values=want_cache, use_cache=True).logits
        got = compiled(ids, past_key_values=got_cache, use_cache=True).logits
        assert_like(got, want)
    report = fxfuse.last_report()
    assert report is not None
    made = [f for f in report.fused if "projection" in f.stages]
    assert len(made) == family.stored


@pytest.mark.cpu
def test_through_inductor_products_are_the_compilers() -> None:
    report = run(layer("by head", bias=True), hidden_states(), *caches(), compiler="inductor")
    assert projected(report)
    (fused,) = (f for f in report.fused if f.kind == "attention")
    assert fused.provider == "loops"


def test_debug_mode_checks_what_is_projected() -> None:
    assert not projected(run(layer(), hidden_states(), *caches(), debug=True))


# --- left, or refused ----------------------------------------------------------------------------


def test_many_rows_and_dynamic_ones_are_the_compilers() -> None:
    assert MAX_ROWS == 16
    many = hidden_states(9, batch=2)
    ks, vs, _ = caches()
    report = run(layer(), many, ks, vs, torch.arange(9))
    assert not projected(report) and reasons(report) == []


def test_settings_keep_products_the_compilers() -> None:
    for settings in ({"disable": ("projection",)}, {"gate": "auto"}):
        report = run(layer(), hidden_states(), *caches(), **settings)
        assert not projected(report) and report.left == [] and reasons(report) == []


class Changed(Layer):
    """A Layer whose projections are others."""

    def __init__(self, products: Any) -> None:
        super().__init__(by_index_copy)
        self.products = products
        generator = torch.Generator().manual_seed(3)
        self.a = nn.Parameter(torch.randn(4, 32, generator=generator))
        self.b = nn.Parameter(torch.randn(64, 4, generator=generator))

    def split(self, x: Tensor) -> list[Tensor]:
        weights = self.project.weight.split([n * 16 for n in self.counts])
        made = self.products(self, x, *weights)
        return [
            t.view(*x.shape[:2], n, 16).transpose(1, 2)
            for t, n in zip(made, self.counts, strict=True)
        ]


def with_adapter(toy: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [F.linear(x, q) + F.linear(F.linear(x, toy.a), toy.b), F.linear(x, k), F.linear(x, v)]


def dequantised(toy: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [F.linear(x, (q * 8).round() / 8), F.linear(x, k), F.linear(x, v)]


def of_two(toy: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [F.linear(x, q), F.linear(x * 2, k), F.linear(x, v)]


def transposed(toy: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [x @ q.t(), F.linear(x, k), F.linear(x, v)]


def gated(toy: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    made = F.linear(x, v)
    return [F.linear(x, q), F.linear(x, k) * made.sigmoid().mean(), made]


def read_twice(toy: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    made = F.linear(x, v)
    toy.seen = made + 1
    return [F.linear(x, q), F.linear(x, k), made]


def clamped(toy: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    made = [F.linear(x, w) for w in (q, k, v)]
    made[0].clamp_(-1, 1)
    return made


@pytest.mark.parametrize(
    ("products", "reason"),
    [
        (with_adapter, "no plain linear: aten.add.Tensor"),
        (dequantised, "whose weight the graph makes"),
        (of_two, "projections of different tensors"),
        (transposed, "no plain linear"),
        (gated, "no plain linear: aten.mul.Tensor"),
        (read_twice, "others read too"),
        (clamped, "written before it is used"),
    ],
)
def test_other_products_are_refused_with_a_reason(products: Any, reason: str) -> None:
    toy = Changed(products)
    report = run(toy, hidden_states(), *caches())
    assert not projected(report)
    (found,) = reasons(report)
    assert reason in found
    (refusal,) = (r for r in report.refused if r.stage == "projection")
    assert "F.linear" in refusal.wanted and "nothing" in refusal.do


class Written(Changed):
    """x, or a weight, is written between the products and the store."""

    def __init__(self, what: str) -> None:
        super().__init__(lambda toy, x, *weights: [F.linear(x, w) for w in weights])
        self.what = what

    def prelude(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        made = super().prelude(q, k, cos, sin)
        (self.x if self.what == "x" else self.project.weight).mul_(2.0)
        return made

    def forward(self, x: Tensor, *memory: Tensor) -> Any:  # type: ignore[override]
        self.x = x
        return super().forward(x, *memory)


@pytest.mark.parametrize("what", ["x", "weight"])
@torch.no_grad()
def test_what_is_written_in_between_is_not_read_again(what: str) -> None:
    plain, toy = Written(what), Written(what)
    memory, copies = caches(), caches()
    want = plain(hidden_states(), *copies)
    torch._dynamo.reset()
    backend = fxfuse.Backend(compiler="eager", gate="always")
    got = torch.compile(toy, backend=backend)(hidden_states(), *memory)
    assert_like(got, want)
    assert_like(memory, copies)
    report = fxfuse.last_report()
    assert report is not None and not projected(report)
    (reason,) = reasons(report)
    assert "is written between" in reason


def test_with_gradients_nothing_is_stored_and_nothing_projected() -> None:
    toy = Layer(lambda q, k, v, *memory: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    torch._dynamo.reset()
    backend = fxfuse.Backend(compiler="aot_eager", gate="always")
    torch.compile(toy, backend=backend)(hidden_states().requires_grad_()).sum().backward()
    report = fxfuse.last_report()
    assert report is not None and not projected(report)


# --- the gate ------------------------------------------------------------------------------------


def test_the_gate_gives_what_was_measured() -> None:
    def fused(target: str, rows: int | None, dtype: str, arch: str = "sm_90") -> bool:
        record = with_dtype(site(128, norm=NORM, store=cached(True)), dtype)
        return gate.decide(target, "projection", gate.Facts(rows, record, arch)).fuse

    assert fused("cuda", 1, "bfloat16") and fused("cuda", 16, "bfloat16")
    assert not fused("cuda", None, "bfloat16") and not fused("cuda", 17, "bfloat16")
    assert not fused("cuda", 1, "float32") and not fused("cpu", 1, "bfloat16")
    # Compiled for these, and never run on them.
    assert not any(fused("cuda", 1, "bfloat16", arch) for arch in ("sm_80", "sm_100", "gfx942"))
