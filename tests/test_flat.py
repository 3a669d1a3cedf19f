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


# --- stores ------------------------------------------------------------------------------------

SLOTS = torch.tensor([7, 2, 9, 0, 4])
S = 12


def each(write: Callable[[Tensor, Tensor, Tensor], Any]) -> Finish:
    """write(cache, slots, rows) for k and v; q is what attention gets."""

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        write(ks, slots, k)
        write(vs, slots, v)
        return q

    return finish


FLAT: dict[str, tuple[Any, tuple[int, ...]]] = {
    "index_copy_": (lambda c, s, x: c.index_copy_(0, s, x), (S,)),
    "index_put_": (lambda c, s, x: c.index_put_((s,), x), (S,)),
    "index_copy_, four axes": (lambda c, s, x: c.index_copy_(1, s, x[None]), (1, S)),
}
BATCHED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "squeeze": (lambda c, s, x: c.index_copy_(0, s, x.squeeze(0)), (S,)),
    "select": (lambda c, s, x: c.index_put_((s,), x[0]), (S,)),
    "view": (lambda c, s, x: c.index_copy_(0, s, x.view(-1, *x.shape[2:])), (S,)),
    "flatten": (lambda c, s, x: c.index_copy_(0, s, x.flatten(0, 1)), (S,)),
    "four axes": (lambda c, s, x: c.index_copy_(1, s, x), (1, S)),
}
LAYOUTS = [("flat", name) for name in FLAT] + [("batched", name) for name in BATCHED]


def stored(
    write: Any, lead: tuple[int, ...], cache: tuple[int, ...], tokens: int, heads: int, slots: Any
) -> fxfuse.Report:
    """The report of q, k and v of [*lead, tokens, heads, D] stored in two caches with canaries."""
    memory = [torch.full(cache, 3.0), torch.full(cache, 4.0), slots]
    shapes = [(*lead, tokens, n, D) for n in (H, heads, heads)]
    return check(Rotated(each(write)), shapes, 3 + torch.arange(tokens).view(*lead, -1), *memory)


@pytest.mark.null
@pytest.mark.parametrize("heads", [G, 1, H])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("kind", "name"), LAYOUTS, ids=" ".join)
def test_a_flat_cache_is_stored_to(kind: str, name: str, tokens: int, heads: int) -> None:
    write, cache = (FLAT if kind == "flat" else BATCHED)[name]
    lead = () if kind == "flat" else (1,)
    report = stored(write, lead, (*cache, heads, D), tokens, heads, SLOTS[:tokens])
    (fused,) = report.fused
    assert fused.stages == ("rope", "store(k,v)") and not report.refused
    assert not fused.record.store.heads_first and not fused.record.k.keep
