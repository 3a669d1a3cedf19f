"""Slots that are odd, and rows that are: what the graph's own write makes of them.

In: layers that store. Out: caches as eager leaves them, canaries and all, or eager's error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.spellings import halves, llama, weightless
from tests.toys import (
    B,
    D,
    Finish,
    G,
    Layer,
    T,
    attend,
    by_index_copy,
    caches,
    check,
    hidden_states,
    stages,
)

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def by_setitem(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks[:, :, slots] = k
    vs[:, :, slots] = v
    return attend(q, ks, vs)


WRITES = pytest.mark.parametrize("finish", [by_index_copy, by_setitem], ids=lambda f: f.__name__)


@WRITES
def test_of_rows_for_one_slot_the_last_one_stays(finish: Finish) -> None:
    def repeated() -> list[Tensor]:
        return [*caches()[:2], torch.tensor([3, 4, 3, 6, 3])]

    assert stages(check(finish, repeated)) == ["store(k,v)"]


@WRITES
@pytest.mark.cpu
def test_of_rows_for_one_slot_inductors_loops_leave_the_last_one(finish: Finish) -> None:
    layer, slots = Layer(finish), torch.tensor([3, 4, 3, 6, 3])
    want, got = ([*caches()[:2], slots] for _ in range(2))
    with torch.no_grad():
        layer(hidden_states(T), *want)
        torch.compile(layer, backend=fxfuse.backend)(hidden_states(T), *got)
    for mine, eager in zip(got[:2], want[:2], strict=True):
        assert torch.allclose(mine, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slot", [12, 1000])
def test_slots_past_the_cache_are_an_error_as_they_are_eagerly(slot: int) -> None:
    layer, x = Layer(by_index_copy), hidden_states(T)
    memory = [*caches()[:2], torch.tensor([3, 4, slot, 6, 7])]
    run = torch.compile(layer, backend=fxfuse.Backend(compiler="eager"))
    for call in (layer, run):
        with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of"):
            call(x, *memory)


# --- a v that is normed on its way to the cache ------------------------------------------------


class NormedV(Layer):
    """Gemma 4: v has a norm without a weight."""

    def __init__(self, finish: Finish, eps: float = 1e-6) -> None:
        super().__init__(finish)
        self.v_eps = eps

    def forward(self, x: Tensor, *memory: Tensor) -> Any:  # type: ignore[override]
        q, k, v = self.split(x)
        q, k = self.prelude(q, k, *self.tables(torch.arange(x.shape[1])))
        return self.finish(q, k, self.normed(v), *memory)

    def normed(self, v: Tensor) -> Tensor:
        return weightless(v, v, self.v_eps)


@WRITES
def test_a_normed_v_is_normed_by_the_store(finish: Finish) -> None:
    report = check(NormedV(finish))
    assert stages(report) == ["store(k,v)"]
    record = report.fused[0].record
    assert record.k is not None and record.k.norm is not None
    assert record.v is not None and record.v.norm is not None and record.v.norm.kind == "rms"


@WRITES
def test_a_v_normed_with_another_eps_is_the_models(finish: Finish) -> None:
    report = check(NormedV(finish, eps=1e-3))
    assert stages(report) == ["store(k)"]
    assert [r.reason for r in report.refused] == [
        "rows that are normed with another eps than those of k"
    ]


class NormedVAlone(NormedV):
    """k turns as it is."""

    def prelude(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return llama(q, cos, sin), llama(k, cos, sin)


@WRITES
def test_a_v_that_is_normed_beside_a_k_that_is_not_is_the_models(finish: Finish) -> None:
    report = check(NormedVAlone(finish))
    assert stages(report) == ["store(k)"]
    assert [r.reason for r in report.refused] == ["rows that are normed where those of k are not"]


class WeightedV(NormedV):
    """Its norm has a weight, which the op has no argument for."""

    def __init__(self, finish: Finish) -> None:
        super().__init__(finish)
        self.v_weight = nn.Parameter(torch.randn(D))

    def normed(self, v: Tensor) -> Tensor:
        return super().normed(v) * self.v_weight


@WRITES
def test_a_v_normed_with_a_weight_is_the_models(finish: Finish) -> None:
    report = check(WeightedV(finish))
    assert stages(report) == ["store(k)"] and len(report.refused) == 1


class KeyIsValue(NormedV):
    """Gemma 4's layers with one product for k and v."""

    def forward(self, x: Tensor, *memory: Tensor) -> Any:  # type: ignore[override]
        q, raw, _ = self.split(x)
        q, k = self.prelude(q, raw, *self.tables(torch.arange(x.shape[1])))
        return self.finish(q, k, self.normed(raw), *memory)


@WRITES
def test_k_and_v_of_one_product_are_normed_apart(finish: Finish) -> None:
    report = check(KeyIsValue(finish))
    assert stages(report) == ["store(k,v)"]


class ReadV(NormedV):
    """Somebody else reads the normed v too."""

    def forward(self, x: Tensor, *memory: Tensor) -> Any:  # type: ignore[override]
        q, k, v = self.split(x)
        q, k = self.prelude(q, k, *self.tables(torch.arange(x.shape[1])))
        v = self.normed(v)
        return self.finish(q, k, v, *memory), v * 2.0


@WRITES
def test_a_normed_v_that_others_read_is_made_for_them(finish: Finish) -> None:
    assert stages(check(ReadV(finish))) == ["store(k,v)"]


class KeyAsValue(Layer):
    """MLA: what the values' cache gets is rotated too."""

    def forward(self, x: Tensor, *memory: Tensor) -> Any:  # type: ignore[override]
        q, k, _ = self.split(x)
        q, k = self.prelude(q, k, *self.tables(torch.arange(x.shape[1])))
        return self.finish(q, k, k, *memory)


@WRITES
def test_a_rotated_key_in_the_values_cache(finish: Finish) -> None:
    assert check(KeyAsValue(finish)).fused


# --- a weight plus one, in float32 or rounded --------------------------------------------------


class Normed(nn.Module):
    """1 + w is added in float32 (Gemma), or rounded to the weight's dtype (vLLM on ROCm)."""

    def __init__(self, *, rounded: bool) -> None:
        super().__init__()
        self.rounded = rounded
        # In bfloat16 1 + 2 ** -8 is 1.
        self.weight = nn.Parameter(torch.full((D,), 2**-8, dtype=torch.bfloat16))

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return llama(self.normed(q), cos, sin), llama(self.normed(k), cos, sin)

    def normed(self, x: Tensor) -> Tensor:
        factor = (self.weight + 1.0).float() if self.rounded else 1.0 + self.weight.float()
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * factor).type_as(x)


@torch.no_grad()
@pytest.mark.parametrize("rounded", [False, True])
def test_one_plus_a_weight_is_rounded_where_the_graph_rounds_it(rounded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, B, G, T, D, generator=generator).bfloat16()
    cos, sin = halves(torch.randn(1, T, D // 2, generator=generator))
    run = torch.compile(Normed(rounded=rounded), backend=fxfuse.Backend(compiler="eager"))
    got = run(q, k, cos, sin)
    assert [f.stages[-1] for f in fxfuse.last_report().fused] == ["rope"]
    assert fxfuse.last_report().fused[0].record.q.norm is not None
    for mine, x in zip(got, (q.double(), k.double()), strict=True):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        want = llama(normed * (1 if rounded else 1 + 2**-8), cos.double(), sin.double())
        # The other rounding would be off by 2 ** -8 = 3.9e-3 everywhere; bfloat16's own is less.
        assert (mine.double() - want).norm() / want.norm() < 2e-3
