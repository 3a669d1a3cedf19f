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
# The one site alone reads what it looks up.
ROPE = "rope(by position)"


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


def check(
    toy: Rotated, shapes: list[tuple[int, ...]], *given: Tensor, compiler: str = "eager"
) -> fxfuse.Report:
    """Results, strides and memory are eager's; the report."""
    rows = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    copies = [x.clone() for x in given]
    others = [x.clone() for x in rows]
    with torch.no_grad():
        want = toy(*others, *copies)
        got = torch.compile(toy, backend=fxfuse.Backend(compiler=compiler))(*rows, *given)
    assert_like(got, want)
    if isinstance(want, Tensor):
        assert got.stride() == want.stride()
    assert_like([*rows, *given], [*others, *copies])
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
    return check(Rotated(each(write)), shapes, 3 + torch.arange(tokens).expand(*lead, -1), *memory)


@pytest.mark.null
@pytest.mark.parametrize("heads", [G, 1, H])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("kind", "name"), LAYOUTS, ids=" ".join)
def test_a_flat_cache_is_stored_to(kind: str, name: str, tokens: int, heads: int) -> None:
    write, cache = (FLAT if kind == "flat" else BATCHED)[name]
    lead = () if kind == "flat" else (1,)
    report = stored(write, lead, (*cache, heads, D), tokens, heads, SLOTS[:tokens])
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k,v)") and not report.refused
    assert fused.record.store.k.axes.endswith("0hd") and not fused.record.k.keep


def put(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots] = rows


def put_behind(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[:, slots] = rows


def put_third(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[:, :, slots] = rows.transpose(-2, -3)


def put_first(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots] = rows[0]


SETITEMS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "flat": (put, (), (S,), ()),
    "flat, four axes": (put_behind, (), (1, S), ()),
    "flat, heads first": (put_third, (), (1,), (S,)),
    "batched": (put_first, (1,), (S,), ()),
    "batched, four axes": (put_behind, (1,), (1, S), ()),
    "batched, heads first": (put_third, (1,), (1,), (S,)),
}


@pytest.mark.null
@pytest.mark.parametrize("heads", [G, 1])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", SETITEMS)
def test_setitem_drops_leading_axes_of_size_1(name: str, tokens: int, heads: int) -> None:
    write, lead, before, after = SETITEMS[name]
    slots = torch.tensor([-1, 2, -5, 0, 4])[:tokens]
    report = stored(write, lead, (*before, heads, *after, D), tokens, heads, slots)
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k,v)") and not report.refused
    assert fused.record.store.k.axes.endswith("h0d" if after else "0hd")
    assert fused.record.store.negative == "wrap"


@pytest.mark.null
@pytest.mark.parametrize("rows", [lambda x: x[0], lambda x: x, lambda x: x[None]])
def test_one_token_of_fewer_or_more_axes(rows: Any) -> None:
    """Rows that are broadcast along axes of size 1 alone."""
    report = stored(lambda c, s, x: put(c, s, rows(x)), (), (S, G, D), 1, G, SLOTS[:1])
    assert [f.stages for f in report.fused] == [(ROPE, "store(k,v)")]


# What is no store of ours: lead, tokens, heads, cache, slots, write, and what the report says.
ONE = torch.tensor([3, 1, 8])
MISSES: dict[str, tuple[Any, ...]] = {
    "one row for several slots": (
        (), 1, G, (S, G, D), ONE, lambda c, s, x: c.index_put_((s,), x),
        "rows of shape [1, 2, 16] where the cache takes [3, 2, 16]",
    ),
    "one row for several slots, repeated": (
        (), 1, G, (S, G, D), ONE, lambda c, s, x: c.index_put_((s,), x.expand(3, -1, -1)),
        "slots along others of rows [others, heads, channels]",
    ),
    "one row of one head for several slots": (
        (), 1, 1, (S, 1, D), ONE, lambda c, s, x: c.index_copy_(0, s, x.expand(3, -1, -1)),
        "slots along others of rows [others, 1, channels]",
    ),
    "one row by setitem": (
        (), 1, G, (S, G, D), ONE, put,
        "rows of shape [1, 2, 16] where the cache takes [3, 2, 16]",
    ),
    "one head for several": (
        (), 5, 1, (S, G, D), SLOTS, lambda c, s, x: c.index_put_((s,), x),
        "rows of shape [5, 1, 16] where the cache takes [5, 2, 16]",
    ),
    "another axis": (
        (), 5, G, (5, S, D), SLOTS[:2], lambda c, s, x: c.index_copy_(1, s, x),
        "slots along heads of rows [tokens, heads, channels]",
    ),
    "tokens in the place of heads": (
        (), 5, 5, (S, 5, D), SLOTS, lambda c, s, x: c.index_copy_(0, s, x.transpose(0, 1)),
        "slots along heads of rows [heads, tokens, channels]",
    ),
    "channels in the place of tokens": (
        (), D, G, (S + D, G, D), torch.arange(D),
        lambda c, s, x: c.index_copy_(0, s, x.transpose(0, 2)),
        "slots along channels of rows [channels, heads, tokens]",
    ),
    "the axis of channels": (
        (), 5, G, (5, G, 2 * D), torch.arange(D), lambda c, s, x: c.index_copy_(2, s, x),
        "slots along channels of rows [tokens, heads, channels]",
    ),
    "slots of three axes": (
        (1,), 5, G, (S, G, D), SLOTS[None, None], put,
        "slots [1, 1, 5] of torch.int64, wanted integers [T] or [B, T]",
    ),
    "added up": (
        (), 5, G, (S, G, D), SLOTS, lambda c, s, x: c.index_put_((s,), x, accumulate=True),
        "an index_put_ that is no plain write of rows",
    ),
    "the first tokens": (
        (), 5, G, (S, G, D), SLOTS[:3], lambda c, s, x: c.index_copy_(0, s, x[:3]),
        "rows of shape [3, 2, 16] that are a part of [5, 2, 16]",
    ),
    "one token of five": (
        (1,), 5, G, (S, G, D), SLOTS[:1], lambda c, s, x: c.index_copy_(0, s, x[:, 2]),
        "rows of shape [1, 2, 16] that are a part of [1, 5, 2, 16]",
    ),
    "one of two batch rows": (
        (2,), 1, G, (S, G, D), SLOTS[:1], lambda c, s, x: c.index_copy_(0, s, x[1]),
        "rows of shape [1, 2, 16] that are a part of [2, 1, 2, 16]",
    ),
}  # fmt: skip


@pytest.mark.null
@pytest.mark.parametrize("name", MISSES)
def test_what_is_no_store_of_whole_rows(name: str) -> None:
    lead, tokens, heads, cache, slots, write, reason = MISSES[name]
    report = stored(write, lead, cache, tokens, heads, slots)
    assert [f.stages for f in report.fused] == [(ROPE,)]
    assert [(r.stage, r.reason) for r in report.refused] == [("store", reason)]


@pytest.mark.null
def test_slots_that_are_more_than_tokens_are_the_models_error() -> None:
    for write in (put, lambda c, s, x: c.index_copy_(0, s, x)):
        with pytest.raises(Exception, match=r"shape|size|elements"):
            stored(write, (), (S, G, D), 3, G, SLOTS)


@pytest.mark.null
def test_rows_that_are_written_to_before_the_store() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        k[0].zero_()
        put(ks, slots, k)
        v.mul_(2)
        put(vs, slots, v)
        return q

    memory = [torch.full((S, G, D), 3.0), torch.full((S, G, D), 4.0), SLOTS]
    shapes = [(5, n, D) for n in (H, G, G)]
    assert [f.stages for f in check(Rotated(finish), shapes, torch.arange(5), *memory).fused] == [
        (ROPE,)
    ]


@pytest.mark.null
def test_two_caches_of_one_pool() -> None:
    pool = torch.full((2, S, G, D), 3.0)
    shapes = [(1, n, D) for n in (H, G, G)]
    report = check(Rotated(each(put)), shapes, torch.arange(1), pool[0], pool[1], SLOTS[:1])
    assert [f.stages for f in report.fused] == [(ROPE, "store(k)")]


@pytest.mark.cpu
@pytest.mark.parametrize("tokens", [1, 5])
def test_inductor_stores_to_a_flat_cache(tokens: int) -> None:
    memory = [torch.full((S, G, D), 3.0), torch.full((S, G, D), 4.0), SLOTS[:tokens]]
    shapes = [(tokens, n, D) for n in (H, G, G)]
    report = check(Rotated(each(put)), shapes, torch.arange(tokens), *memory, compiler="inductor")
    assert [f.stages for f in report.fused] == [(ROPE, "store(k,v)")]
