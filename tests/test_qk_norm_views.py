"""Norms of q and k as serving engines spell them: rows of heads cut out of one projection, which a
gate may share. Found, joined, right in float64, and read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import fxfuse
from fxfuse import passes, reference
from fxfuse.patterns.record import Norm
from fxfuse.settings import Settings
from tests.norm_toys import compiled
from tests.spellings import gemma, rsqrt
from tests.toys import Attention, hidden_states

D = 16
GEMMA = Norm("head", "before", True, 1.0)


def exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma's norm without casts."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight)


def by_rows(norm: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """All heads of all tokens as rows of one matrix, a copy where x is cut from something wider."""
    return norm(x.reshape(-1, D), weight, eps).view(*x.shape)


def by_heads(norm: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm(x.unflatten(-1, (-1, D)), weight, eps).flatten(-2)


class Packed(nn.Module):
    """[q, k, v], or [q and gate by head, k, v], of one projection; `how` norms q and k."""

    def __init__(
        self, heads: tuple[int, int], how: Any, gated: bool = False, norm: Any = gemma,
        eps: tuple[float, float] = (1e-5, 1e-6),
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.how, self.gated, self.norm, self.eps = heads, how, gated, norm, eps
        generator = torch.Generator().manual_seed(0)
        self.q_weight, self.k_weight = (
            nn.Parameter(torch.randn(D, generator=generator) * 0.3) for _ in range(2)
        )

    def width(self) -> int:
        return D * (self.heads[0] * (1 + self.gated) + 2 * self.heads[1])

    def normed(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, g = self.heads
        q, k, v = qkv.split([D * h * (1 + self.gated), D * g, D * g], -1)
        if self.gated:
            q, _ = q.unflatten(-1, (h, 2 * D)).chunk(2, -1)
            q = q.reshape(*k.shape[:-1], h * D)
        q = self.how(self.norm, q, self.q_weight, self.eps[0])
        return q, self.how(self.norm, k, self.k_weight, self.eps[1]), v

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, D)).transpose(-3, -2) for x in self.normed(qkv))
        # More heads of k than of q: each q meets several.
        if self.heads[1] > self.heads[0]:
            q = q.repeat_interleave(self.heads[1] // self.heads[0], -3)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def draw(toy: Packed, *rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*rows, toy.width(), generator=generator, dtype=torch.float64).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad(), fresh_cache():
        yield


@pytest.mark.null
@pytest.mark.parametrize("gated", [False, True], ids=["packed", "gated"])
@pytest.mark.parametrize("how", [by_rows, by_heads])
@pytest.mark.parametrize("heads", [(8, 2), (4, 8), (3, 3), (1, 1), (5, 1)])
@pytest.mark.parametrize("rows", [(7,), (1,), (2, 5)], ids=str)
def test_one_site_as_near_to_float64_as_eager(
    heads: tuple[int, int], how: Any, rows: tuple[int, ...], gated: bool
) -> None:
    toy = Packed(heads, how, gated)
    x = draw(toy, *rows)
    eager = toy(x.float())
    got = torch.compile(toy, backend=fxfuse.Backend(compiler="eager", gate="always"))(x.float())
    toy.norm = exact
    want = toy.double()(x.float().double())
    # Half a float32 ulp: sums in another order.
    assert error(got, want) <= 1.05 * error(eager, want) + 2**-24
    report = fxfuse.last_report()
    assert report is not None and report.refused == []
    (fused,) = report.fused
    assert fused.kind == "norm" and fused.eps == (1e-5, 1e-6)
    assert (fused.record.q.norm, fused.record.k.norm) == (GEMMA, GEMMA)


@pytest.mark.null
def test_rows_too_many_to_be_tried_whole() -> None:
    """The proof takes few of them."""
    toy = Packed((8, 2), by_rows)
    x = draw(toy, 2**18 // 2, dtype=torch.bfloat16)
    graphs: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(passes.fuse_graph(gm, Settings(gate="always"))[1])
        return lambda *args: (x,)

    torch.compile(toy.bfloat16(), backend=backend)(x)
    assert [f.kind for f in graphs[0].fused] == ["norm"]


@pytest.mark.null
def test_any_number_of_tokens() -> None:
    toy = Packed((4, 2), by_rows)
    x = draw(toy, 6, dtype=torch.float32)
    torch._dynamo.mark_dynamic(x, 0)
    assert [f.kind for f in compiled(toy, x).fused] == ["norm"]


@pytest.mark.null
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_graphs(dtype: torch.dtype) -> None:
    toy = Packed((4, 2), by_rows).to(dtype)
    x = draw(toy, 7, dtype=dtype)
    report = compiled(toy, x, tolerance=4 * torch.finfo(dtype).eps)
    (fused,) = report.fused
    name = str(dtype).removeprefix("torch.")
    assert (fused.record.q.dtype, fused.record.k.dtype) == (name, name)


@pytest.mark.null
def test_one_plus_w_is_added_in_float32() -> None:
    """bfloat16 has no 1 + 2**-8: a weight rounded there would be 1."""
    toy = Packed((2, 2), by_rows).bfloat16()
    toy.q_weight.fill_(2**-8)
    toy.k_weight.fill_(2**-8)
    x = torch.ones(3, toy.width(), dtype=torch.bfloat16) * 1.0078125
    assert len(compiled(toy, x, tolerance=0).fused) == 1


@pytest.mark.null
def test_a_rotation_behind_rows_of_heads() -> None:
    class Rows(Attention):
        def prelude(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            def rows(x: Tensor, weight: Tensor) -> Tensor:
                x = x.transpose(1, 2)
                return rsqrt(x.reshape(-1, 16), weight, 1e-6).view(x.shape).transpose(1, 2)

            q, k = rows(q, self.q_weight), rows(k, self.k_weight)
            return self.rotate(q, k, cos.unsqueeze(1), sin.unsqueeze(1))

    report = compiled(Rows(norm=rsqrt), hidden_states())
    assert [f.stages for f in report.fused] == [("rms_norm", "rope")] and not report.refused


# --- what is not the same rows -----------------------------------------------------------------


def turned(norm: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As many tokens as heads: the statistic of head i, token j meets head j, token i."""
    rows, heads = x.reshape(-1, D), x.unflatten(-1, (-1, D))
    factor = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    factor = factor.view(*heads.shape[:-1], 1).transpose(-3, -2)
    return (heads * factor * (1 + weight)).flatten(-2)


def one_row_on(norm: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The statistic of the row before."""
    rows = x.reshape(-1, D)
    factor = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps).roll(1, 0)
    return (rows * factor * (1 + weight)).view(x.shape)


def regrouped(norm: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """6 x 4 statistics read as 4 x 6."""
    rows, heads = x.reshape(-1, D), x.unflatten(-1, (-1, D))
    factor = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    factor = factor.view(4, 6, 1).transpose(0, 1)
    return (heads * factor * (1 + weight)).flatten(-2)


@pytest.mark.null
@pytest.mark.parametrize(
    ("wrong", "tokens"), [(turned, 4), (one_row_on, 7), (regrouped, 6)], ids=lambda x: str(x)[:18]
)
def test_statistics_of_other_rows_are_no_norm(wrong: Callable[..., Tensor], tokens: int) -> None:
    toy = Packed((4, 4), wrong).double()
    report = compiled(toy, draw(toy, tokens), tolerance=1e-13)
    assert not any(f.kind == "norm" and f.record.k is not None for f in report.fused)


# --- through Inductor --------------------------------------------------------------------------


@pytest.mark.cpu
@pytest.mark.parametrize("gated", [False, True], ids=["packed", "gated"])
def test_rows_are_read_where_they_lie(gated: bool) -> None:
    """One call for q and k, on views of the projection."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(*, q: Tensor, k: Tensor, **rest: Any) -> Any:
        seen.append((q, k))
        return reference.norm_rope(q=q, k=k, **rest)

    toy = Packed((4, 8), by_rows, gated)
    x = draw(toy, 7, dtype=torch.float32)
    with fxfuse.register_provider("look", look, ops=["norm_rope"]):
        backend = fxfuse.Backend(gate="always")
        torch.testing.assert_close(torch.compile(toy, backend=backend)(x), toy(x))
    ((q, k),) = seen
    assert (tuple(q.shape), tuple(k.shape)) == ((1, 7, 4, D), (1, 7, 8, D))
    for view, heads in ((q, D * (1 + gated)), (k, D)):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert view.stride()[1:] == (toy.width(), heads, 1)


@pytest.mark.cpu
def test_the_gate_leaves_them_to_the_compiler() -> None:
    toy = Packed((4, 2), by_rows)
    report = compiled(toy, draw(toy, 7, dtype=torch.float32), compiler="inductor", gate="auto")
    assert report.fused == [] and [x.kind for x in report.left] == ["norm"]
