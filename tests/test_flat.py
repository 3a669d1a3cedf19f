"""q, k and v as a serving engine hands them to its attention: given, not projected, their heads an
axis of their own, with a batch of one or without a batch axis.

In: what happens to k and v behind the rotation. Out: results and caches as eager leaves them, and
the site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.spellings import llama
from tests.toys import D, G, assert_like

H = 4
Finish = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Rotated(nn.Module):
    """RoPE by position, tables looked up, one row of heads a token; then `finish`."""

    table: Tensor

    def __init__(self, finish: Finish, axis: int = -2) -> None:
        super().__init__()
        self.finish, self.axis = finish, axis
        generator = torch.Generator().manual_seed(0)
        angle = torch.randn(64, D // 2, generator=generator).repeat(1, 2)
        self.register_buffer("table", torch.cat((angle.cos(), angle.sin()), -1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *memory: Tensor) -> Any:
        cos, sin = self.table[positions].unsqueeze(self.axis).chunk(2, -1)
        return self.finish(llama(q, cos, sin), llama(k, cos, sin), v, *memory)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(toy: Rotated, shapes: list[tuple[int, ...]], *given: Tensor) -> fxfuse.Report:
    """Results with their strides, and memory, are eager's; the report."""
    rows = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    copies = [x.clone() for x in given]
    with torch.no_grad():
        want = toy(*rows, *copies)
        got = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))(*rows, *given)
    assert_like(got, want)
    assert_like(list(given), copies)
    report = fxfuse.last_report()
    assert report is not None
    return report


def returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return q, k, v


@pytest.mark.null
def test_heads_before_tokens_are_joined_where_they_are_as_many() -> None:
    """[H, T, D] is read as H batch rows; the op has no q and k of unlike numbers of these."""
    positions = torch.arange(5)
    for heads, sites in ((G, 2), (H, 1)):
        torch._dynamo.reset()
        shapes = [(H, 5, D), (heads, 5, D), (heads, 5, D)]
        report = check(Rotated(returned, axis=0), shapes, positions)
        assert len(report.fused) == sites


@pytest.mark.null
def test_a_k_that_all_batch_rows_share_is_an_op_of_its_own() -> None:
    shapes = [(3, 5, H, D), (1, 5, G, D), (1, 5, G, D)]
    assert len(check(Rotated(returned), shapes, torch.arange(5)).fused) == 2
