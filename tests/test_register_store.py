"""register_store: an op of a library that writes rows of k and v into caches, by its contract.

In: an invented op beside RoPE. Out: caches as the op itself leaves them, and no call of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.test_flat import ROPE, Rotated, check
from tests.test_layouts import PAGES, SLOTS, H, N, P, T, X
from tests.toys import D, G


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@torch.library.custom_op("invented::reshape_and_cache", mutates_args=("key_cache", "value_cache"))
def reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
    kv_cache_dtype: str, k_scale: Tensor, v_scale: Tensor,
) -> None:  # fmt: skip
    """As vLLM's: pages [N, P, G, D]; rows at slots below 0 are skipped; 8 bits are divided."""
    kept = slot_mapping >= 0
    at = slot_mapping[kept]
    for rows, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        rows = rows[kept] if kv_cache_dtype == "auto" else rows[kept].float() / scale
        rows = rows if kv_cache_dtype == "auto" else rows.to(torch.float8_e5m2).view(torch.uint8)
        cache[at // P, at % P] = rows


@torch.library.custom_op("invented::write_keys", mutates_args=("cache",))
def write_keys(cache: Tensor, rows: Tensor, blocks: Tensor, at: Tensor) -> None:
    """[N, G, D / x, P, x], by block and place in the page."""
    cache[blocks, :, :, at] = rows.view(*rows.shape[:-1], D // X, X)


@torch.library.custom_op("invented::write_values", mutates_args=("cache",))
def write_values(cache: Tensor, rows: Tensor, blocks: Tensor, at: Tensor) -> None:
    cache[blocks, :, :, at] = rows.view(*rows.shape[:-1], D // X, X)


@torch.library.custom_op("invented::padded_write", mutates_args=("key_cache", "value_cache"))
def padded_write(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor,
    pad_slot_id: int | None = None,
) -> None:  # fmt: skip
    """Pages [N, P, G, D]; rows at the pad slot are skipped, other slots count from the end."""
    kept = torch.ones_like(slots, dtype=torch.bool) if pad_slot_id is None else slots != pad_slot_id
    at = slots[kept]
    key_cache[at // P, at % P], value_cache[at // P, at % P] = key[kept], value[kept]


SAME_NAMES = {name: name for name in ("key", "value", "key_cache", "value_cache", "slots")}
PADDED = torch.ops.invented.padded_write.default
OP = torch.ops.invented.reshape_and_cache.default
ARGUMENTS = {
    "key": "key",
    "value": "value",
    "key_cache": "key_cache",
    "value_cache": "value_cache",
    "slots": "slot_mapping",
    "key_scale": "k_scale",
    "value_scale": "v_scale",
}
ROWS = [(T, n, D) for n in (H, G, G)]
SOME = torch.tensor([17, -1, 8, 0, -1])
SKIPS = {
    "all": SLOTS,
    "some": SOME,
    "none": torch.full((T,), -1),
    # Of two rows for one slot the last one stays, whatever is skipped behind it.
    "twice": torch.tensor([3, 8, 3, -1, -1]),
}


@pytest.fixture
def plain() -> Iterator[None]:
    with fxfuse.register_store(OP, **ARGUMENTS, when={"kv_cache_dtype": "auto"}):
        yield


@pytest.fixture
def bits() -> Iterator[None]:
    when = {"kv_cache_dtype": "fp8_e5m2"}
    with fxfuse.register_store(OP, **ARGUMENTS, format=torch.float8_e5m2, when=when):
        yield


def caching(kind: str) -> Any:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, *by: Tensor
    ) -> Any:
        reshape_and_cache(k, v, ks, vs, slots, kind, *by)
        return q

    return finish


def report_of(kind: str, memory: list[Tensor], slots: Tensor, compiler: str) -> fxfuse.Report:
    by = [torch.tensor([0.5]), torch.full((1,), 0.25)]
    return check(
        Rotated(caching(kind)), ROWS, torch.arange(T), *memory, slots, *by, compiler=compiler
    )


COMPILERS = pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)


@COMPILERS
@pytest.mark.parametrize("slots", SKIPS.values(), ids=SKIPS)
def test_both_writes_join_and_rows_below_0_are_skipped(
    plain: None, slots: Tensor, compiler: str
) -> None:
    memory = [torch.full(PAGES, 3.0), torch.full(PAGES, 4.0)]
    report = report_of("auto", memory, slots, compiler)
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k,v)") and not report.refused
    assert fused.record.store.negative == "skip" and not fused.record.k.keep


@COMPILERS
def test_rows_are_cast_as_the_contract_says(bits: None, compiler: str) -> None:
    memory = [torch.full(PAGES, 3, dtype=torch.uint8), torch.full(PAGES, 4, dtype=torch.uint8)]
    (fused,) = report_of("fp8_e5m2", memory, SOME, compiler).fused
    assert fused.stages == (ROPE, "store(k,v)")
    assert fused.record.store.k.cast.dtype == "float8_e5m2"
    assert fused.record.store.k.cast.scale == "divide"


@pytest.mark.null
def test_a_call_that_the_contract_is_not_about_stays(plain: None) -> None:
    memory = [torch.full(PAGES, 3, dtype=torch.uint8), torch.full(PAGES, 4, dtype=torch.uint8)]
    report = report_of("fp8_e5m2", memory, SLOTS, "eager")
    assert [f.stages for f in report.fused] == [(ROPE,)]
    (refusal,) = report.refused
    assert "with kv_cache_dtype='fp8_e5m2', registered for 'auto'" in refusal.reason


@pytest.mark.null
def test_without_an_entry_the_op_stays() -> None:
    memory = [torch.full(PAGES, 3.0), torch.full(PAGES, 4.0)]
    report = report_of("auto", memory, SOME, "eager")
    assert [f.stages for f in report.fused] == [(ROPE,)]
    assert "no cache write that is known" in report.refused[0].reason


@pytest.mark.null
def test_where_v_cannot_join_the_whole_op_stays(plain: None) -> None:
    def finish(
        q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor, *by: Tensor
    ) -> Any:
        reshape_and_cache(k, 2 * v, ks, vs, slots, "auto", *by)
        return q

    memory = [torch.full(PAGES, 3.0), torch.full(PAGES, 4.0)]
    by = [torch.ones(1), torch.ones(1)]
    report = check(Rotated(finish), ROWS, torch.arange(T), *memory, SOME, *by)
    assert [f.stages for f in report.fused] == [(ROPE,)]
    assert any("of which one cannot join" in r.reason for r in report.refused)


# A slot that is skipped, and slots: below the first, from the end, inside of the cache, behind it.
PADS = {
    -1: [17, -1, 8, -24, -1],
    -2: [-1, 3, -2, -2, 0],
    8: [17, 8, -16, 0, 8],
    N * P: [N * P, -1, 3, N * P, 0],
    2**40: [5, 2**40, 2**40, -3, 0],
}


def padded(pad: int | None) -> Any:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        padded_write(k, v, ks, vs, slots, pad)
        return q

    return finish


def padded_report(pad: int | None, slots: Tensor, said: Any, compiler: str) -> fxfuse.Report:
    """The report of a call with that pad slot, where the contract says `said`."""
    memory = [torch.full(PAGES, 3.0), torch.full(PAGES, 4.0)]
    with fxfuse.register_store(PADDED, **SAME_NAMES, negative="wrap", skipped_slot=said):
        given = (torch.arange(T), *memory, slots)
        return check(Rotated(padded(pad)), ROWS, *given, compiler=compiler)


@COMPILERS
@pytest.mark.parametrize("pad", PADS)
def test_rows_at_the_slot_that_the_contract_names_are_skipped(pad: int, compiler: str) -> None:
    (fused,) = padded_report(pad, torch.tensor(PADS[pad]), pad, compiler).fused
    assert fused.stages == (ROPE, "store(k,v)")
    assert (fused.record.store.negative, fused.record.store.skipped) == ("wrap", pad)


@COMPILERS
def test_nothing_is_written_where_every_row_is_skipped(compiler: str) -> None:
    (fused,) = padded_report(N * P, torch.full((T,), N * P), N * P, compiler).fused
    assert fused.record.store.skipped == N * P


@pytest.mark.null
@pytest.mark.parametrize("pad", [-2, None])
def test_the_slot_that_is_skipped_may_be_an_argument(pad: int | None) -> None:
    slots = torch.tensor(PADS[-2]) if pad is not None else torch.tensor([1, -1, 3, 0, 9])
    (fused,) = padded_report(pad, slots, "pad_slot_id", "eager").fused
    assert fused.record.store.skipped == pad


@pytest.mark.null
def test_a_skipped_slot_that_only_the_run_knows_is_told() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        padded_write(k, v, ks, vs, slots, ks.shape[0] * P)
        return q

    memory = [torch.full(PAGES, 3.0), torch.full(PAGES, 4.0)]
    for cache in memory:
        torch._dynamo.mark_dynamic(cache, 0)
    with fxfuse.register_store(PADDED, **SAME_NAMES, skipped_slot="pad_slot_id"):
        report = check(Rotated(finish), ROWS, torch.arange(T), *memory, SLOTS)
    assert [f.stages for f in report.fused] == [(ROPE,)]
    assert any("skips a slot that is no number" in r.reason for r in report.refused)


@pytest.mark.null
def test_k_and_v_that_skip_unlike_slots_are_not_joined() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        at = slots % P
        write_keys(ks, k, slots, at)
        write_values(vs, v, slots, at)
        return q

    contract: dict[str, Any] = {"key": "rows", "key_cache": "cache", "slots": "blocks"}
    contract |= {"offsets": "at", "layout": "0hd1e"}
    memory = [torch.full((N, G, D // X, P, X), 3.0) for _ in "kv"]
    values = torch.ops.invented.write_values.default
    keys = torch.ops.invented.write_keys.default
    slots = torch.tensor([0, 2, 1, 0, 2])
    with (
        fxfuse.register_store(keys, **contract, skipped_slot=5),
        fxfuse.register_store(values, **contract, skipped_slot=6),
    ):
        report = check(Rotated(finish), ROWS, torch.arange(T), *memory, slots)
    assert [f.stages for f in report.fused] == [(ROPE, "store(k)")]
    assert any("slot 6 is skipped where those of k skip 5" in r.reason for r in report.refused)


@pytest.mark.null
def test_blocks_and_places_of_split_keys() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, blocks: Tensor, at: Tensor) -> Any:
        write_keys(ks, k, blocks, at)
        return q, v

    memory = torch.full((N, G, D // X, P, X), 3.0)
    with fxfuse.register_store(
        torch.ops.invented.write_keys.default, key="rows", key_cache="cache", slots="blocks",
        offsets="at", layout="0hd1e", negative="wrap",
    ):  # fmt: skip
        report = check(Rotated(finish), ROWS, torch.arange(T), memory, SLOTS // P, SLOTS % P)
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k)") and fused.record.store.k.axes == "0hd1e"


@pytest.mark.null
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"slots": "slot_map"}, "has no argument slot_map"),
        ({"layout": "01xd"}, "layout '01xd', wanted h, d and 0"),
        ({"layout": "1hd"}, "layout '1hd'"),
        ({"value": None}, "wanted value and value_cache, or neither"),
        ({"when": {"dtype": "auto"}}, "has no argument dtype"),
        ({"skipped_slot": "pad"}, "has no argument pad"),
        ({"skipped_slot": 1.5}, "skipped_slot=1.5, wanted a number or an argument's name"),
    ],
)
def test_a_contract_that_says_nothing_is_an_error(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(fxfuse.FxfuseError, match=reason):
        fxfuse.register_store(OP, **{**ARGUMENTS, **change})


@pytest.mark.null
def test_an_op_is_registered_once(plain: None) -> None:
    with pytest.raises(fxfuse.FxfuseError, match="registered already"):
        fxfuse.register_store(OP, **ARGUMENTS)
