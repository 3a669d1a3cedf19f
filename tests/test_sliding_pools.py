"""Layers of two kinds over pools of two sizes: k and v go to their layer's pool, at its slots.

In: layers that write at `slots` or at `full_to_swa[slots]`. Out: q, and every buffer with its
canaries, as eager leaves them; and which stores are in a site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.spellings import gpt_oss, narrow
from tests.toys import assert_like, stages

pytestmark = pytest.mark.null

H, G, D, T = 4, 2, 16, 5
FULL, WINDOW = 24, 11
KINDS = ("full", "sliding")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


Where = Callable[[Tensor, Tensor], Tensor]  # slots, full_to_swa -> slots of a sliding layer


class Layers(nn.Module):
    """RoPE and store of each layer; `buffer_of` says which of the buffers a layer writes to."""

    def __init__(self, kinds: tuple[str, ...], buffer_of: Any = None, where: Any = None) -> None:
        super().__init__()
        self.kinds = kinds
        self.buffer_of = buffer_of or range(len(kinds))
        self.where: Where = where or (lambda slots, full_to_swa: full_to_swa[slots])

    def forward(
        self, qkv: Tensor, angles: Tensor, slots: Tensor, full_to_swa: Tensor, *buffers: Tensor
    ) -> list[Tensor]:
        cos, sin = (t.unsqueeze(1) for t in narrow(angles))
        at = {"full": slots, "sliding": self.where(slots, full_to_swa)}
        attended = []
        for layer, (kind, place) in enumerate(zip(self.kinds, self.buffer_of, strict=True)):
            q, k, v = (x.unflatten(-1, (-1, D)) for x in qkv[layer].split((H * D, G * D, G * D), 1))
            attended.append(gpt_oss(q, cos, sin))
            buffers[2 * place][at[kind]] = gpt_oss(k, cos, sin)
            buffers[2 * place + 1][at[kind]] = v
        return attended


def inputs(kinds: tuple[str, ...], tokens: int = T) -> list[Tensor]:
    """Slots in no order, two of them counted from the end; the map says -1 where no token is."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(len(kinds), tokens, (H + 2 * G) * D, generator=generator)
    angles = torch.randn(tokens, D // 2, generator=generator)
    slots = torch.randperm(FULL, generator=generator)[:tokens]
    full_to_swa = torch.full((FULL,), -1)
    full_to_swa[slots] = torch.randperm(WINDOW, generator=generator)[:tokens]
    slots[:2] -= FULL
    sizes = [FULL if kind == "full" else WINDOW for kind in kinds]
    buffers = [torch.full((n, G, D), 3.0 + i) for i, n in enumerate(sizes) for _ in "kv"]
    return [qkv, angles, slots, full_to_swa, *buffers]


@torch.no_grad()
def check(toy: nn.Module, given: list[Tensor], compiler: str = "eager") -> fxfuse.Report:
    """Results and buffers are eager's; the report."""
    theirs = [x.clone() for x in given]
    want = toy(*theirs)
    got = torch.compile(toy, backend=fxfuse.Backend(compiler=compiler))(*given)
    assert_like(got, want)
    assert_like(given, theirs)
    report = fxfuse.last_report()
    assert report is not None
    return report


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "kinds", [KINDS, KINDS[::-1], ("full", "sliding", "sliding", "full")], ids="-".join
)
def test_each_kind_stores_to_its_own_pool(kinds: tuple[str, ...], tokens: int) -> None:
    report = check(Layers(kinds), inputs(kinds, tokens))
    assert stages(report) == ["store(k,v)"] * len(kinds)
    assert [f.stages for f in report.fused] == [("rope", "store(k,v)")] * len(kinds)
    assert not report.refused


def test_no_token_is_written_to_another_kinds_slots() -> None:
    """Without the map a sliding layer's slots are outside of its pool, or another token's."""
    given = inputs(KINDS)
    before = [x.clone() for x in given]
    check(Layers(KINDS), given)
    for kind, k_buffer, old in zip(KINDS, given[4::2], before[4::2], strict=True):
        at = before[2] if kind == "full" else before[3][before[2]]
        untouched = torch.ones(len(k_buffer), dtype=torch.bool)
        untouched[at] = False
        assert torch.equal(k_buffer[untouched], old[untouched])
        assert not torch.eq(k_buffer[at], old[at]).any()


def test_layers_that_write_the_same_buffer_write_in_order() -> None:
    kinds = ("full", "sliding", "full")
    report = check(Layers(kinds, buffer_of=(0, 1, 0)), inputs(kinds))
    assert stages(report) == ["store(k,v)"] * 3


def test_layers_whose_pools_are_parts_of_one_tensor() -> None:
    class Parts(Layers):
        def forward(self, *given: Tensor) -> list[Tensor]:
            *given, pool = given
            return super().forward(*given, *pool.unbind(0))

    given = inputs(("full", "full"))[:4]
    assert check(Parts(("full", "full")), [*given, torch.full((4, FULL, G, D), 3.0)]).fused


def outside(slots: Tensor, full_to_swa: Tensor) -> Tensor:
    """A token that the window has lost: -1 in the map, the last slot to index_put_."""
    return torch.where(torch.arange(len(slots)) == 1, -1, full_to_swa[slots])


def remapped(slots: Tensor, full_to_swa: Tensor) -> Tensor:
    """A map that is written to behind the lookup."""
    found = full_to_swa[slots]
    full_to_swa.fill_(0)
    return found


def as_int32(slots: Tensor, full_to_swa: Tensor) -> Tensor:
    return full_to_swa.int()[slots].long()


@pytest.mark.parametrize("where", [outside, remapped, as_int32], ids=lambda f: f.__name__)
def test_whatever_the_second_map_says(where: Where) -> None:
    report = check(Layers(KINDS, where=where), inputs(KINDS))
    assert stages(report) == ["store(k,v)"] * 2


def test_no_tokens_at_all() -> None:
    check(Layers(KINDS), inputs(KINDS, tokens=0))


@pytest.mark.cpu
def test_inductor_stores_to_both_pools() -> None:
    assert stages(check(Layers(KINDS), inputs(KINDS), "inductor")) == ["store(k,v)"] * 2
