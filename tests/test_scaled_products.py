"""Projections that are scaled behind the product, as weight-only int8 modules spell them.

In: q, k and v of `F.linear(x, w_int8.to(x.dtype)) * scale`, scaled by a buffer or a parameter. Out:
the site, whose sources are the scaled products, and results and caches as eager leaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from tests.spellings import gemma, rsqrt
from tests.test_reading import check as check_values
from tests.toys import (
    D,
    Layer,
    T,
    assert_like,
    by_index_copy,
    caches,
    check,
    hidden_states,
    stages,
)

Product = Callable[[Tensor, "Int8"], Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def library(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def weight_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * weight * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def scaled(x: Tensor, m: Int8) -> Tensor:
    return F.linear(x, m.weight.to(x.dtype)) * m.scale


def scale_first(x: Tensor, m: Int8) -> Tensor:
    return m.scale * F.linear(x, m.weight.to(x.dtype))


def matmul(x: Tensor, m: Int8) -> Tensor:
    return torch.matmul(x, m.weight.to(x.dtype).t()) * m.scale[None, None]


def divided(x: Tensor, m: Int8) -> Tensor:
    return F.linear(x, m.weight.to(x.dtype)) / m.scale


def shifted(x: Tensor, m: Int8) -> Tensor:
    return F.linear(x, m.weight.to(x.dtype)) * m.scale + m.bias


def of_a_plain_weight(x: Tensor, m: Int8) -> Tensor:
    return F.linear(x, m.plain) * m.scale


PRODUCTS = [scaled, scale_first, matmul, divided, shifted, of_a_plain_weight]


class Int8(nn.Module):
    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, rows: int, product: Product, *, trained: bool, by_tensor: bool) -> None:
        super().__init__()
        self.product = product
        draw = torch.Generator().manual_seed(rows)
        weight = torch.randint(-127, 128, (rows, 32), generator=draw).to(torch.int8)
        self.register_buffer("weight", weight)
        self.plain = nn.Parameter(weight.float() / 300)
        scale = 0.004 * (0.5 + torch.rand(1 if by_tensor else rows, generator=draw))
        bias = torch.randn(rows, generator=draw)
        for name, values in (("scale", scale), ("bias", bias)):
            if trained:
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self)


class Quantised(Layer):
    """q, k and v by modules of their own, or parts of one."""

    def __init__(
        self,
        product: Product = scaled,
        norm: Any = rsqrt,
        *,
        trained: bool = False,
        by_tensor: bool = False,
        packed: bool = False,
        finish: Any = by_index_copy,
    ) -> None:
        super().__init__(finish)
        self.norm = norm
        rows = [sum(self.counts) * D] if packed else [n * D for n in self.counts]
        made = [Int8(n, product, trained=trained, by_tensor=by_tensor) for n in rows]
        self.products = nn.ModuleList(made)

    def split(self, x: Tensor) -> list[Tensor]:
        parts = [product(x) for product in self.products]
        if len(parts) == 1:
            parts = list(parts[0].split([n * D for n in self.counts], -1))
        heads = zip(parts, self.counts, strict=True)
        return [t.view(*x.shape[:2], n, D).transpose(1, 2) for t, n in heads]


@pytest.mark.null
@pytest.mark.parametrize("trained", [False, True], ids=["buffer", "parameter"])
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda f: f.__name__)
def test_a_scaled_product_is_a_source(product: Product, trained: bool) -> None:
    report = check(Quantised(product, trained=trained))
    (fused,) = report.fused
    assert fused.stages == ("rms_norm", "rope", "store(k,v)") and not report.refused


@pytest.mark.null
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("by_tensor", [False, True], ids=["by channel", "by tensor"])
@pytest.mark.parametrize("norm", [rsqrt, library, gemma, weight_first, None])
def test_whatever_is_normed_behind_it(norm: Any, by_tensor: bool, packed: bool) -> None:
    report = check(Quantised(norm=norm, by_tensor=by_tensor, packed=packed))
    (fused,) = report.fused
    assert fused.stages[-2:] == ("rope", "store(k,v)") and not report.refused
    assert (fused.record.q.norm is None) == (norm is None)


@pytest.mark.null
def test_the_values_behind_it_are_read_right() -> None:
    assert check_values(Quantised(shifted), hidden_states(T), *caches()) > 12


@pytest.mark.cpu
@pytest.mark.parametrize("trained", [False, True], ids=["buffer", "parameter"])
def test_inductor_stores_what_eager_does(trained: bool) -> None:
    layer, want, got = Quantised(trained=trained), caches(), caches()
    with torch.no_grad():
        eager = layer(hidden_states(T), *want)
        mine = torch.compile(layer, backend=fxfuse.backend)(hidden_states(T), *got)
    assert_like([mine, *got], [eager, *want])
    assert stages(fxfuse.last_report()) == ["store(k,v)"]


# --- products of other sorts -------------------------------------------------------------------


class Wide(Layer):
    """A norm of the whole width that multiplies by its weight before the statistic is taken."""

    def __init__(self) -> None:
        super().__init__(by_index_copy, wide=True)
        self.norm = weight_first


@pytest.mark.null
def test_a_product_whose_statistic_is_of_the_raw_one_is_normed() -> None:
    (fused,) = check(Wide()).fused
    assert fused.record.q.norm is not None and fused.record.q.norm.over == "given"


def of_rows(x: Tensor, m: Int8) -> Tensor:
    """Activations have a scale by row too: the factor is data."""
    return F.linear(x, m.weight.to(x.dtype)) * x.abs().amax(-1, keepdim=True)


def by_position(x: Tensor, m: Int8) -> Tensor:
    return F.linear(x, m.weight.to(x.dtype)) * torch.arange(1, T + 1)[:, None]


def widened(x: Tensor, m: Int8) -> Tensor:
    """The product is repeated by what it is multiplied by."""
    return F.linear(x, m.weight[:1].to(x.dtype)) * m.scale


@pytest.mark.null
@pytest.mark.parametrize("product", [of_rows, by_position, widened], ids=lambda f: f.__name__)
def test_other_products_stay_right(product: Product) -> None:
    assert check(Quantised(product)).fused


@pytest.mark.null
def test_a_scale_that_is_written_after_the_product_is_the_old_one() -> None:
    def written(x: Tensor, m: Int8) -> Tensor:
        y = F.linear(x, m.weight.to(x.dtype)) * m.scale
        m.scale.mul_(1.5)
        return y

    with torch.no_grad():
        want, got = Quantised(written), Quantised(written)
        memory, mine = caches(), caches()
        eager = want(hidden_states(T), *memory)
        fused = torch.compile(got, backend=fxfuse.Backend(compiler="eager"))
        assert_like(fused(hidden_states(T), *mine), eager)
    assert_like(mine, memory)
    assert_like([p.scale for p in got.products], [p.scale for p in want.products])
    assert stages(fxfuse.last_report()) == ["store(k,v)"]
