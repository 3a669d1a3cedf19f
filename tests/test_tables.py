"""Where tables come from: any tensor of turns is one, whatever it was computed from.

In: toys with tables of their own. Out: eager's result, and the record's tables.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.spellings import llama
from tests.toys import B, D, G, T, assert_like, attend

pytestmark = pytest.mark.null

HEADS = 4


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Turned(nn.Module):
    """q and k [B, H, T, D] turned by what `tables` makes of angles."""

    def __init__(self, tables: Any, kv_heads: int = G) -> None:
        super().__init__()
        self.tables, self.kv_heads = tables, kv_heads
        self.project = nn.Linear(8, (HEADS + 2 * kv_heads) * D, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.project(x).unflatten(-1, (-1, D)).transpose(1, 2)
        q, k, v = y.split([HEADS, self.kv_heads, self.kv_heads], 1)
        cos, sin = self.tables(angles)
        return attend(llama(q, cos, sin), llama(k, cos, sin), v)


def compiled(toy: Turned, angles: Tensor) -> Any:
    """The one site of a toy that gives eager's result."""
    x = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = toy(x, angles)
        got = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))(x, angles)
    assert_like(got, want)
    (fused,) = fxfuse.last_report().fused
    return fused.record


def twice(angles: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([angles, angles], -1)
    return both.cos(), both.sin()


def test_angles_may_be_data() -> None:
    """Flux: positions come as floats from outside."""
    angles = torch.rand(B, 1, T, D // 2)
    assert not compiled(Turned(twice), angles).q.rotation.by_head


def test_each_head_may_turn_by_tables_of_its_own() -> None:
    """LTX-2: the full width is turned, so that each head has its part of the frequencies."""
    angles = torch.rand(B, HEADS, T, D // 2)
    record = compiled(Turned(twice, kv_heads=HEADS), angles)
    assert record.q.rotation.by_head and record.k is not None


def test_heads_may_stand_side_by_side_in_the_tables() -> None:
    def tables(angles: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles.cos(), angles.sin()  # [B, T, H * D]
        return tuple(t.unflatten(-1, (HEADS, D)).transpose(1, 2) for t in (cos, sin))

    record = compiled(Turned(tables, kv_heads=HEADS), torch.rand(B, T, HEADS * D))
    assert record.q.rotation.by_head


class InRegions(Turned):
    """z_image: the rotation stands in an autocast region of its own, attention behind it."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.project(x).unflatten(-1, (-1, D)).transpose(1, 2)
        q, k, v = y.split([HEADS, self.kv_heads, self.kv_heads], 1)
        with torch.autocast("cpu", enabled=False):
            cos, sin = self.tables(angles)
            q = llama(q, cos, sin)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            k = llama(k, cos, sin)
        return attend(q, k, v)


def test_a_rotation_may_stand_in_an_autocast_region() -> None:
    record = compiled(InRegions(twice), torch.rand(B, 1, T, D // 2))
    assert record.q.rotation is not None and record.k is not None
