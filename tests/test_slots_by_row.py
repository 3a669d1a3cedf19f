"""Slots by batch row and token, [B, T], over flat and paged caches; and as one axis, made of those.

In: k and v [B, T, G, D] written at such slots. Out: caches as eager leaves them, canaries kept, and
the store in the fused op. Run as a program, the file writes them by the Triton kernel, in its
interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.interpreted import interpreted, launching
from tests.test_flat import ROPE, Rotated, check, draw, each
from tests.toys import D, G, assert_like

H, B, T = 4, 3, 5
# Pages, and tokens a page.
N, P = 6, 4
Write = Callable[[Tensor, Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def setitem(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots] = rows


def index_put(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.index_put_((slots,), rows)


def flat_view(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.view(-1, G, D)[slots] = rows


def pages(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, slots % P] = rows


def pages_behind_heads(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, :, slots % P] = rows


def both_flattened(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots.flatten()] = rows.flatten(0, 1)


def index_copy(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.index_copy_(0, slots.view(-1), rows.reshape(-1, G, D))


def index_copy_of_a_remainder(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """No index is below 0, though slots are."""
    cache.index_copy_(0, slots.view(-1) % (N * P), rows.reshape(-1, G, D))


def flattened_pages(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots.reshape(-1) // P, (slots % P).reshape(-1)] = rows.flatten(0, 1)


FLAT, PAGES = (N * P, G, D), (N, P, G, D)
WRITES: dict[str, tuple[Write, tuple[int, ...], str]] = {
    "setitem": (setitem, FLAT, "0hd"),
    "index_put_": (index_put, FLAT, "0hd"),
    "flat view": (flat_view, PAGES, "0hd"),
    "pages": (pages, PAGES, "01hd"),
    "heads first": (pages_behind_heads, (N, G, P, D), "0h1d"),
    "both flattened": (both_flattened, FLAT, "0hd"),
    "index_copy_": (index_copy, FLAT, "0hd"),
    "index_copy_ of a remainder": (index_copy_of_a_remainder, FLAT, "0hd"),
    "flattened pages": (flattened_pages, PAGES, "01hd"),
}


def slots_of(batch: int, tokens: int, *, wraps: bool) -> Tensor:
    """Slots in no order, every other one from the end where they wrap."""
    found = torch.randperm(N * P, generator=torch.Generator().manual_seed(0))[: batch * tokens]
    slots = found.view(batch, tokens)
    if wraps:
        slots[:, ::2] -= N * P
    return slots


def stored(write: Write, cache: tuple[int, ...], slots: Tensor, compiler: str) -> fxfuse.Report:
    lead, tokens = tuple(slots.shape[:1]), slots.shape[-1]
    memory = [torch.full(cache, 3.0), torch.full(cache, 4.0), slots]
    rows = [(*lead, tokens, n, D) for n in (H, G, G)]
    positions = torch.arange(slots.numel()).view(slots.shape)
    return check(Rotated(each(write)), rows, positions, *memory, compiler=compiler)


COMPILERS = pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)


@COMPILERS
@pytest.mark.parametrize("name", WRITES)
def test_every_row_is_stored_at_its_own_slots(name: str, compiler: str) -> None:
    write, cache, axes = WRITES[name]
    report = stored(write, cache, slots_of(B, T, wraps=name != "index_copy_"), compiler)
    (fused,) = report.fused
    assert fused.stages == (ROPE, "store(k,v)") and not report.refused
    assert fused.record.store.k.axes == fused.record.store.v.axes == axes


@pytest.mark.null
@pytest.mark.parametrize("sizes", [(1, 5), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("name", WRITES)
def test_one_row_or_one_token(name: str, sizes: tuple[int, int]) -> None:
    write, cache, _ = WRITES[name]
    report = stored(write, cache, slots_of(*sizes, wraps=False), "eager")
    assert [f.stages for f in report.fused] == [(ROPE, "store(k,v)")] and not report.refused


class ByPosition(Rotated):
    """Rows, parts of one tensor, are stored at their positions: of as many batch rows and tokens,
    whatever those are.
    """

    def forward(self, rows: Tensor, *memory: Tensor) -> Any:  # type: ignore[override]
        positions = memory[0]
        return super().forward(*rows.split([H, G, G], -2), *memory, positions)


@pytest.mark.null
@pytest.mark.parametrize("name", ["setitem", "flat view", "pages"])
def test_one_compile_for_all_sizes(name: str) -> None:
    write, shape, _ = WRITES[name]
    toy, fused = ByPosition(each(write)), []
    inner = fxfuse.Backend(compiler="eager")

    def backend(gm: Any, inputs: Any) -> Any:
        compiled = inner(gm, inputs)
        fused.append([f.stages for f in fxfuse.last_report().fused])
        return compiled

    run = torch.compile(toy, backend=backend)
    for batch, tokens in ((3, 7), (2, 5), (4, 3)):
        slots = slots_of(batch, tokens, wraps=False)
        rows = draw(batch, tokens, H + G + G, D, seed=0)
        for x in (slots, rows):
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        want, got = ([torch.full(shape, 3.0), torch.full(shape, 4.0)] for _ in range(2))
        with torch.no_grad():
            eager = toy(rows, slots, *want)
            assert_like([run(rows, slots, *got), *got], [eager, *want])
    assert fused == [[(ROPE, "store(k,v)")]]


# --- what is no store of whole rows ------------------------------------------------------------


def transposed(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Tokens before batch rows: another order than the op's."""
    cache[slots.t()] = rows.transpose(0, 1)


def crossed(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Right by its shapes alone."""
    cache[slots[:, :B]] = rows[:, :B].transpose(0, 1)


def in_the_place_of_heads(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots[:2, :G]] = rows[:2, :G, :, :].transpose(1, 2)


def shared(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """One page for each row, an offset for each token."""
    cache[slots[:, :1] // P, slots[:1] % P] = rows


def some_rows(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots[:2]] = rows[:2]


def repeated(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots] = rows[:1]


MISSES = {
    transposed: (FLAT, "slots along others of rows [tokens, batch, heads, channels]"),
    crossed: (FLAT, "rows of shape [3, 3, 2, 16] that are a part of [3, 5, 2, 16]"),
    in_the_place_of_heads: (FLAT, "that are a part of [3, 5, 2, 16]"),
    shared: (PAGES, "indices of different shapes"),
    some_rows: (FLAT, "rows of shape [2, 5, 2, 16] that are a part of [3, 5, 2, 16]"),
    repeated: (FLAT, "rows of shape [1, 5, 2, 16] where the cache takes [3, 5, 2, 16]"),
}


@pytest.mark.null
@pytest.mark.parametrize("write", MISSES, ids=lambda f: f.__name__)
def test_other_rows_stay_the_models(write: Write) -> None:
    cache, reason = MISSES[write]
    report = stored(write, cache, slots_of(B, T, wraps=False), "eager")
    assert [f.stages for f in report.fused] == [(ROPE,)]
    assert [r.stage for r in report.refused] == ["store"] and reason in report.refused[0].reason


@pytest.mark.null
def test_slots_that_are_written_after_they_were_flattened() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        flat = slots.flatten()
        slots.add_(1)
        ks[flat] = k.flatten(0, 1)
        vs[flat] = v.flatten(0, 1)
        return q

    memory = [torch.full(FLAT, 3.0), torch.full(FLAT, 4.0), slots_of(B, T, wraps=False) - 1]
    rows = [(B, T, n, D) for n in (H, G, G)]
    check(Rotated(finish), rows, torch.arange(T).expand(B, -1), *memory)


# --- by the kernel -----------------------------------------------------------------------------


def main() -> None:
    launches = launching()
    for write, cache, _ in WRITES.values():
        torch._dynamo.reset()
        report = stored(write, cache, slots_of(B, T, wraps=write is not index_copy), "eager")
        assert [f.stages for f in report.fused] == [(ROPE, "store(k,v)")]
    assert launches == ["norm_rope_store_"] * len(WRITES)
    print("done")


@pytest.mark.aot
@pytest.mark.long
def test_the_kernel_stores_to_the_same_slots() -> None:
    done = interpreted(__file__)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


if __name__ == "__main__":
    main()
