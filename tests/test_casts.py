"""Chains in front of an 8-bit cache that look like a cast and are another statement.

In: rows that something else happens to between the rotation and the cache. Out: caches as eager
leaves them, whether the store was fused or not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.test_flat import Rotated, check
from tests.test_layouts import PAGES, SLOTS, H, P, T
from tests.toys import D, G

pytestmark = pytest.mark.null
E5M2 = torch.float8_e5m2


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def put(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, slots % P] = rows


def stored(finish: Any, *by: Tensor, tokens: int = T, heads: int = G) -> fxfuse.Report:
    """The report of k and v stored by `finish` in two 8-bit caches with canaries."""
    memory = [torch.full(PAGES, 3.0).to(E5M2) for _ in "kv"]
    rows = [(tokens, n, D) for n in (H, heads, heads)]
    return check(Rotated(finish), rows, torch.arange(tokens), *memory, SLOTS[:tokens], *by)


def test_v_written_between_its_cast_and_its_store() -> None:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, s: Tensor
    ) -> Any:
        cast = (v / s).to(E5M2)
        v.zero_()
        put(ks, slots, (k / s).to(E5M2))
        put(vs, slots, cast)
        return q

    assert stored(finish, torch.tensor([0.5])).fused


def test_a_cast_v_written_before_its_store() -> None:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, s: Tensor
    ) -> Any:
        cast = (v / s).to(E5M2)
        cast.view(torch.uint8)[1].zero_()
        put(ks, slots, (k / s).to(E5M2))
        put(vs, slots, cast)
        return q

    assert stored(finish, torch.tensor([0.5])).fused


def test_a_number_behind_the_clamp() -> None:
    """clamp, then times a number: no cast of ours multiplies behind its clamp."""

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        put(ks, slots, (k.clamp(-0.5, 0.5) * 16).to(E5M2))
        put(vs, slots, (v.clamp(-0.5, 0.5) * 16).to(E5M2))
        return q

    assert stored(finish).fused


def test_a_scale_that_makes_heads_of_one() -> None:
    """x [T, 1, D] / scale [T, G, 1] has more heads than x."""

    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, s: Tensor
    ) -> Any:
        put(ks, slots, (k / s).to(E5M2))
        put(vs, slots, (v / s).to(E5M2))
        return q

    assert stored(finish, 1 + torch.rand(T, G, 1), heads=1).fused


def test_a_scale_by_token_of_rows_that_are_turned_before_the_store() -> None:
    """As many tokens as heads: what was scaled by token lies where the heads do."""

    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, s: Tensor
    ) -> Any:
        for cache, rows in ((ks, k), (vs, v)):
            scaled = (rows.transpose(0, 1) / s).to(E5M2)
            put(cache, slots, scaled.transpose(0, 1))
        return q

    scale = torch.tensor([0.25, 4.0]).view(G, 1, 1)
    assert stored(finish, scale, tokens=G).fused


def test_other_bits_are_no_cast() -> None:
    """bfloat16 bits taken for integers and back, with other bits in between."""

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        for cache, rows in ((ks, k), (vs, v)):
            half = rows.bfloat16().contiguous()
            put(cache, slots, half.view(torch.float16).to(E5M2))
        return q

    assert stored(finish).fused


def test_rows_of_a_batch_in_a_cache_with_a_batch_of_one() -> None:
    """[B, T] rows as one row of tokens: the cache's axis of size 1 is not their batch."""

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        for cache, rows in ((ks, k), (vs, v)):
            cache.index_copy_(1, slots, rows.flatten(0, 1).unsqueeze(0))
        return q

    memory = [torch.full((1, 24, G, D), 3.0 + i) for i in range(2)]
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(0))[: 2 * T]
    rows = [(2, T, n, D) for n in (H, G, G)]
    for compiler in ("eager", "inductor"):
        torch._dynamo.reset()
        given = [x.clone() for x in memory]
        positions = torch.arange(T).expand(2, -1)
        report = check(Rotated(finish), rows, positions, *given, slots, compiler=compiler)
        assert [f.stages[-1] for f in report.fused] == ["store(k,v)"]


def test_indices_that_are_written_after_they_were_made_of_slots() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        block, place = slots // P, slots % P
        place.add_(1).remainder_(P)
        ks[block, place] = k
        vs[block, place] = v
        return q

    memory = [torch.full(PAGES, 3.0 + i) for i in range(2)]
    rows = [(T, n, D) for n in (H, G, G)]
    assert check(Rotated(finish), rows, torch.arange(T), *memory, SLOTS).fused
