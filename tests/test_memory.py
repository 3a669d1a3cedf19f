"""Memory: stores, aliases and in-place writes; outputs and every buffer equal plain eager's.

A test gives what happens to q, k and v after the rotation, and the memory it happens in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toys import (
    SLOTS,
    Attention,
    B,
    D,
    Finish,
    G,
    Layer,
    S,
    T,
    attend,
    by_index_copy,
    caches,
    check,
    stages,
)

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


# --- cache layouts -----------------------------------------------------------------------------


def by_index_put(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks[:, :, slots] = k
    vs[:, :, slots] = v
    return attend(q, ks, vs)


@pytest.mark.parametrize("finish", [by_index_copy, by_index_put], ids=lambda f: f.__name__)
def test_k_and_v_are_stored_by_the_site(finish: Finish) -> None:
    report = check(finish)
    assert stages(report) == ["store(k,v)"]
    record = report.fused[0].record
    assert record.store is not None and record.store.k.axes == "bh0d"
    assert record.k is not None and not record.k.keep, "attention reads the cache"


def test_slots_from_the_end_wrap_for_index_put() -> None:
    report = check(by_index_put, lambda: [*caches()[:2], torch.tensor([0, -1, 5, -3, 2])])
    assert report.fused[0].record.store is not None
    assert report.fused[0].record.store.negative == "wrap"


def test_a_cache_with_tokens_before_heads() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks.index_copy_(1, slots, k.transpose(1, 2))
        vs.index_copy_(1, slots, v.transpose(1, 2))
        return attend(q, ks.transpose(1, 2), vs.transpose(1, 2))

    report = check(
        finish, lambda: [torch.full((B, S, G, D), 3.0), torch.full((B, S, G, D), 4.0), SLOTS]
    )
    assert stages(report) == ["store(k,v)"]
    assert report.fused[0].record.store.k.axes == "b0hd"


def by_slices(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks[:, :, 2 : 2 + T] = k
    vs[:, :, 2 : 2 + T].copy_(v)
    return attend(q, ks, vs)


def by_cat(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks, vs = torch.cat([ks, k], dim=-2), torch.cat([vs, v], dim=-2)
    return attend(q, ks, vs), ks, vs


def by_functional_index_copy(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor
) -> Any:
    ks, vs = ks.index_copy(2, slots, k), vs.index_copy(2, slots, v)
    return attend(q, ks, vs), ks, vs


def added_up(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.index_add_(2, slots, k)
    vs.index_add_(2, slots, v, alpha=2)
    return attend(q, ks, vs)


def rows_of_one_head(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks[:, :1].index_copy_(2, slots, k[:, 1:])
    vs[:, 1:].index_copy_(2, slots, v[:, :1])
    return attend(q, ks, vs)


def first_tokens(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.index_copy_(2, slots[:3], k[:, :, :3])
    vs.index_copy_(2, slots[:3], v[:, :, :3])
    return attend(q, ks, vs)


@pytest.mark.parametrize(
    "finish",
    [by_slices, by_cat, by_functional_index_copy, added_up, rows_of_one_head, first_tokens],
    ids=lambda f: f.__name__,
)
def test_other_writes_stay_the_models(finish: Finish) -> None:
    report = check(finish)
    assert stages(report) == [""], "the rotation is fused, the write is not"


def test_one_head_of_two_is_not_the_whole_of_k() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks.index_copy_(1, slots, k[:, 0])
        vs.index_copy_(1, slots, v[:, 0])
        return attend(q, k, v)

    assert stages(check(finish, lambda: [*torch.full((2, B, S, D), 3.0), SLOTS])) == [""]


def test_k_alone_when_v_is_written_otherwise() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks.index_copy_(2, slots, k)
        vs[:, :, 2 : 2 + T] = v
        return attend(q, ks, vs)

    assert stages(check(finish)) == ["store(k)"]


# --- order -------------------------------------------------------------------------------------


def reads_k_between(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.index_copy_(2, slots, k)
    seen = ks.sum((0, 1, 3))
    vs.index_copy_(2, slots, v)
    return attend(q, ks, vs), seen


def reads_v_between(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.index_copy_(2, slots, k)
    seen = vs.sum((0, 1, 3))
    vs.index_copy_(2, slots, v)
    return attend(q, ks, vs), seen


def reads_before(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    old = ks.sum((0, 1, 3)) + vs.sum((0, 1, 3))
    return by_index_copy(q, k, v, ks, vs, slots), old


def attends_to_the_old_cache(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor
) -> Any:
    old = attend(q, ks, vs)
    return by_index_copy(q, k, v, ks, vs, slots), old


def v_before_k(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    vs.index_copy_(2, slots, v)
    ks.index_copy_(2, slots, k)
    return attend(q, ks, vs)


def writes_k_again(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.index_copy_(2, slots, k)
    ks[:, :, 4].fill_(7.0)
    vs.index_copy_(2, slots, v)
    return attend(q, ks, vs)


def slots_move_between(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor
) -> Any:
    ks.index_copy_(2, slots, k)
    slots.add_(1)
    vs.index_copy_(2, slots, v)
    return attend(q, ks, vs)


def slots_move_after(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.index_copy_(2, slots, k)
    vs.index_copy_(2, slots, v)
    slots.add_(T)
    return attend(q, ks, vs)


def nobody_reads_the_cache(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor
) -> Any:
    ks.index_copy_(2, slots, k)
    vs.index_copy_(2, slots, v)
    return attend(q, k, v)


def v_is_written_to_after(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor
) -> Any:
    vs.index_copy_(2, slots, v)
    v.zero_()
    ks.index_copy_(2, slots, k)
    return attend(q, ks, vs)


ORDERS = {
    reads_k_between: None,
    reads_v_between: "store(k,v)",
    reads_before: "store(k,v)",
    attends_to_the_old_cache: None,
    v_before_k: "store(k,v)",
    writes_k_again: None,
    slots_move_between: None,
    slots_move_after: "store(k,v)",
    nobody_reads_the_cache: "store(k,v)",
    v_is_written_to_after: None,
}


@pytest.mark.parametrize(
    ("finish", "stored"), ORDERS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_the_order_of_reads_and_writes_is_kept(finish: Finish, stored: str | None) -> None:
    report = check(finish)
    assert report.fused
    assert stages(report) == [stored] if stored else stages(report) != ["store(k,v)"]


# --- aliases -----------------------------------------------------------------------------------


def halves_of_one_buffer() -> list[Tensor]:
    pool = torch.full((2, B, G, S, D), 3.0)
    return [pool[0], pool[1], SLOTS]


def interleaved_in_one_buffer() -> list[Tensor]:
    pool = torch.full((B, G, S, 2, D), 3.0)
    return [pool[..., 0, :], pool[..., 1, :], SLOTS]


def overlapping() -> list[Tensor]:
    pool = torch.full((B, G, S + 2, D), 3.0)
    return [pool[:, :, :S], pool[:, :, 2:], SLOTS]


def one_cache_twice() -> list[Tensor]:
    cache = torch.full((B, G, S, D), 3.0)
    return [cache, cache, SLOTS]


def parts_of_larger_pools() -> list[Tensor]:
    pools = [torch.full((B + 1, G, S + 4, D), 3.0) for _ in range(2)]
    return [pools[0][1:, :, 4:], pools[1][:-1, :, :S], SLOTS]


@pytest.mark.parametrize(
    "memory",
    [
        halves_of_one_buffer,
        interleaved_in_one_buffer,
        overlapping,
        one_cache_twice,
        parts_of_larger_pools,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("finish", [by_index_copy, v_before_k, reads_k_between, reads_v_between])
def test_caches_that_share_memory(finish: Finish, memory: Any) -> None:
    assert check(finish, memory).fused


class Two(Attention):
    """Two layers; `shared` gives the second one the first one's caches."""

    def __init__(self, finish: Finish, second: Finish, *, shared: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.shared = Layer(finish), Layer(second), shared

    def forward(self, x: Tensor, *memory: Tensor) -> Any:  # type: ignore[override]
        *mine, slots = memory
        first = self.first(x, *mine[:2], slots)
        return first, self.second(2 * x, *mine[0 if self.shared else 2 :][:2], slots)


def caches_of_two_layers() -> list[Tensor]:
    return [*caches()[:2], *caches()]


def stores_a_squashed_v(
    q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor
) -> Any:
    return nobody_reads_the_cache(q, k, v.tanh() * v, ks, vs, slots)


def test_two_layers_write_one_cache() -> None:
    report = check(Two(by_index_copy, by_index_copy, shared=True))
    assert stages(report) == ["store(k,v)", "store(k,v)"]


@pytest.mark.parametrize("finish", [by_index_copy, v_before_k, nobody_reads_the_cache])
def test_layers_at_the_same_slots_keep_their_own_v(finish: Finish) -> None:
    report = check(Two(finish, finish), caches_of_two_layers)
    assert stages(report) == ["store(k,v)", "store(k,v)"]


def test_a_layer_without_a_plain_v_takes_no_other_layers() -> None:
    report = check(Two(nobody_reads_the_cache, stores_a_squashed_v), caches_of_two_layers)
    assert stages(report) == ["store(k,v)", "store(k)"]
