"""Caches of three axes: the flat view of a paged cache, and a cache of rows without heads.

In: a toy that stores into them. Out: attention and caches as eager leaves them, with the store in
the fused op.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.toys import (
    B,
    D,
    G,
    Layer,
    S,
    Sizes,
    T,
    assert_like,
    attend,
    check,
    hidden_states,
    stages,
)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def paged(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    """transformers' continuous batching: tokens of all requests in one row, read back by index."""
    for cache, rows in ((ks, k), (vs, v)):
        cache.index_copy_(0, slots, rows.squeeze(0).transpose(0, 1))
    read = [torch.index_select(c, 0, slots).transpose(0, 1).unsqueeze(0) for c in (ks, vs)]
    return attend(q, *read)


def without_heads(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    """An indexer's keys, one head that the cache leaves out."""
    ks.index_copy_(1, slots, k.squeeze(1))
    vs.index_copy_(1, slots, v.squeeze(1))
    return attend(q, ks.unsqueeze(1), vs.unsqueeze(1))


CASES = {
    "paged": (Layer(paged), 1, (S, G, D)),
    "without heads": (Layer(without_heads, sizes=Sizes(kv_heads=1)), B, (B, S, D)),
}


def run(call: Any, name: str) -> list[Tensor]:
    """What the layer returns, and its caches; untouched slots hold canaries."""
    _, batch, shape = CASES[name]
    memory = [torch.full(shape, 3.0), torch.full(shape, 4.0)]
    slots = torch.tensor([11, 3, 0, 7, 4])
    with torch.no_grad():
        return [call(hidden_states(T)[:batch], *memory, slots), *memory]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)
def test_a_cache_of_three_axes_is_stored_to(compiler: str, name: str) -> None:
    layer = CASES[name][0]
    got = run(torch.compile(layer, backend=fxfuse.Backend(compiler=compiler)), name)
    (fused,) = fxfuse.last_report().fused
    assert fused.stages == ("rms_norm", "rope", "store(k,v)")
    assert_like(got, run(layer, name))


def scaled_after_the_store(*x: Tensor) -> Any:
    """mistral4: what scales q is computed after k was stored, before the cache is read."""
    q, k, v, ks, vs, slots = x
    ks.index_copy_(2, slots, k)
    vs.index_copy_(2, slots, v)
    scale = 1 + torch.log(1 + torch.floor(slots / 4))
    return attend(q * scale[:, None], ks, vs)


def q_read_before_the_store(*x: Tensor) -> Any:
    """Somebody needs q before k is stored: k's store is an op of its own, whose q has no heads."""
    q, k, v, ks, vs, slots = x
    ks.mul_(q.mean())
    ks.index_copy_(2, slots, k)
    vs.index_copy_(2, slots, v)
    return attend(q, ks, vs)


@pytest.mark.null
@pytest.mark.parametrize(
    ("finish", "stored"),
    [(scaled_after_the_store, ["store(k,v)"]), (q_read_before_the_store, ["", "store(k,v)"])],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_order_of_store_and_q(finish: Any, stored: list[str]) -> None:
    assert sorted(stages(check(finish))) == stored
