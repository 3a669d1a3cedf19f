"""K and V as parts of one buffer, as serving engines have it: [2, pages, ..] or [pages, 2, ..].

In: how the buffer is taken apart, and pages written at slots. Out: the buffer as eager leaves it,
canaries and all, and one store of both where the parts have nothing in common. Run as a program,
the file writes them by the Triton kernel, in its interpreter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

import fxfuse
from fxfuse.lens import look
from fxfuse.patterns.disjoint import are_disjoint
from fxfuse.slots import Slot
from tests.interpreted import interpreted, launching
from tests.test_flat import ROPE, Rotated, check, draw
from tests.toys import D, G, assert_like

H, T = 4, 5
# Pages, and tokens a page.
N, P = 6, 4
SLOTS = torch.tensor([17, -3, 8, 0, 22])
Parts = Callable[[Tensor], Any]
Write = Callable[[Tensor, Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def pages(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, slots % P] = rows


def behind_heads(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, :, slots % P] = rows


def flat_view(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.view(-1, G, D)[slots] = rows


def flat(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots] = rows


FIRST, SECOND = (2, N, P, G, D), (N, 2, P, G, D)
# The buffer, its parts, and how they are written.
BUFFERS: dict[str, tuple[tuple[int, ...], Parts, Write]] = {
    "kv[0], kv[1]": (FIRST, lambda kv: (kv[0], kv[1]), pages),
    "unbind": (FIRST, lambda kv: kv.unbind(0), pages),
    "select": (FIRST, lambda kv: (kv.select(0, 0), kv.select(0, 1)), pages),
    "v first": (FIRST, lambda kv: (kv[1], kv[0]), pages),
    "flat views": (FIRST, lambda kv: (kv[0], kv[1]), flat_view),
    "of a view": (FIRST, lambda kv: kv.view(2, -1, G, D).unbind(), flat),
    "heads first": ((2, N, G, P, D), lambda kv: (kv[0], kv[1]), behind_heads),
    "kv[:, 0], kv[:, 1]": (SECOND, lambda kv: (kv[:, 0], kv[:, 1]), pages),
    "unbind(1)": (SECOND, lambda kv: kv.unbind(1), pages),
    "chunk(2, 1)": (SECOND, lambda kv: [x.squeeze(1) for x in kv.chunk(2, 1)], pages),
    "page by page, heads first": ((N, 2, G, P, D), lambda kv: kv.unbind(1), behind_heads),
    "chunk of pages": ((2 * N, P, G, D), lambda kv: kv.chunk(2), pages),
    "slices of pages": ((2 * N, P, G, D), lambda kv: (kv[:N], kv[N:]), pages),
    "split of heads": ((N, P, 2 * G, D), lambda kv: kv.split(G, 2), pages),
    "split of channels": ((N, P, G, 2 * D), lambda kv: kv.split(D, -1), pages),
    "a layer's": ((3, 2, N, P, G, D), lambda kv: kv[1].unbind(), pages),
}


def finish_of(parts: Parts, write: Write, between: Any = None) -> Any:
    def finish(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> Any:
        ks, vs = parts(kv)
        write(ks, slots, k)
        seen = q if between is None else (q, between(kv))
        write(vs, slots, v)
        return seen

    return finish


def stored(
    shape: tuple[int, ...], parts: Parts, write: Write, compiler: str = "eager", between: Any = None
) -> list[tuple[str, ...]]:
    rows = [(T, n, D) for n in (H, G, G)]
    toy = Rotated(finish_of(parts, write, between))
    report = check(toy, rows, torch.arange(T), torch.full(shape, 3.0), SLOTS, compiler=compiler)
    return [f.stages for f in report.fused]


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)
@pytest.mark.parametrize("name", BUFFERS)
def test_both_parts_are_stored_by_one_op(name: str, compiler: str) -> None:
    assert stored(*BUFFERS[name], compiler=compiler) == [(ROPE, "store(k,v)")]


@pytest.mark.null
@pytest.mark.parametrize("name", ["kv[0], kv[1]", "kv[:, 0], kv[:, 1]", "flat views"])
def test_buffers_of_any_number_of_pages(name: str) -> None:
    shape, parts, write = BUFFERS[name]
    toy = Rotated(finish_of(parts, write))
    run = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))
    dim = shape.index(N)
    for count in (N, N + 3):
        want, got = (torch.full((*shape[:dim], count, *shape[dim + 1 :]), 3.0) for _ in "ab")
        torch._dynamo.mark_dynamic(got, dim)
        rows = [draw(T, n, D, seed=n) for n in (H, G, G)]
        with torch.no_grad():
            eager = toy(*rows, torch.arange(T), want, SLOTS)
            mine = run(*rows, torch.arange(T), got, SLOTS)
        assert_like([mine, got], [eager, want])
    assert [f.stages for f in fxfuse.last_report().fused] == [(ROPE, "store(k,v)")]


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["kv[0], kv[1]", "kv[:, 0], kv[:, 1]", "flat views"])
@torch.no_grad()
def test_no_buffer_is_copied(name: str) -> None:
    shape, parts, write = BUFFERS[name]
    rows = [draw(T, n, D, seed=n) for n in (H, G, G)]
    kv = torch.full([128 if n == N else n for n in shape], 3.0)
    run = torch.compile(Rotated(finish_of(parts, write)), backend=fxfuse.backend)
    with fresh_cache():
        _, [code] = run_and_get_code(run, *rows, torch.arange(T), kv, SLOTS)
    assert fxfuse.last_report().fused[0].stages == (ROPE, "store(k,v)")
    buffers = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    sizes = [math.prod(int(n) for n in b.split(",") if n.strip()) for b in buffers]
    assert sizes and max(sizes) <= T * H * D < kv.numel() / 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize("name", ["kv[0], kv[1]", "kv[:, 0], kv[:, 1]", "flat views"])
@torch.no_grad()
def test_no_memory_is_allocated_for_a_buffer(name: str) -> None:
    shape, parts, write = BUFFERS[name]
    rows = [draw(T, n, D, seed=n) for n in (H, G, G)]
    kv = torch.full([4096 if n == N else n for n in shape], 3.0)
    given = [*rows, torch.arange(T), kv, SLOTS]
    toy = Rotated(finish_of(parts, write))
    want = toy(*[x.clone() for x in given[:4]], wanted := kv.clone(), SLOTS)
    given = [x.cuda() for x in given]
    run = torch.compile(toy.cuda(), backend=fxfuse.backend)
    got = run(*given)
    assert fxfuse.last_report().fused[0].stages == (ROPE, "store(k,v)")
    assert_like([got.cpu(), given[4].cpu()], [want, wanted])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(*given)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < kv.nbytes / 4


# --- parts that have something in common, or are looked at in between --------------------------

MISSES: dict[str, tuple[tuple[int, ...], Parts, Write, Any]] = {
    "one part twice": (FIRST, lambda kv: (kv[1], kv[1]), pages, None),
    "one part in two views": (FIRST, lambda kv: (kv[1], kv[1].view(N, P, G, D)), pages, None),
    "pages in common": ((2 * N, P, G, D), lambda kv: (kv[: N + 1], kv[N:]), pages, None),
    "channels in common": (
        (N, P, G, 2 * D), lambda kv: (kv[..., :D], kv[..., 1 : D + 1]), pages, None,
    ),
    "read in between": (FIRST, lambda kv: kv.unbind(), pages, lambda kv: kv.sum()),
    "a view is read in between": (FIRST, lambda kv: kv.unbind(), pages, lambda kv: kv[1].sum()),
    "written in between": (FIRST, lambda kv: kv.unbind(), pages, lambda kv: kv.add_(1).sum()),
}  # fmt: skip


@pytest.mark.null
@pytest.mark.parametrize("name", MISSES)
def test_other_parts_are_right(name: str) -> None:
    shape, parts, write, between = MISSES[name]
    assert stored(shape, parts, write, between=between) != [(ROPE, "store(k,v)")]


# --- what is known of places in a storage ------------------------------------------------------


def slot_of(x: Tensor) -> Slot:
    place = (tuple(x.shape), x.stride(), x.storage_offset())
    return Slot(*place, x.dtype, x.device, 0, None)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(*[st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=4)] * 2,
       *[st.integers(0, 30)] * 2)  # fmt: skip
def test_what_is_disjoint_has_nothing_in_common(a: Any, b: Any, first: int, second: int) -> None:
    memory = torch.arange(1 << 10)
    x, y = (
        memory.as_strided([n for n, _ in axes], [s for _, s in axes], start)
        for axes, start in ((a, first), (b, second))
    )
    common = {*x.flatten().tolist()} & {*y.flatten().tolist()}
    assert not (are_disjoint(slot_of(x), slot_of(y)) and common)


@pytest.mark.null
@pytest.mark.parametrize("name", BUFFERS)
def test_the_lens_knows_where_views_begin(name: str) -> None:
    shape, parts, _ = BUFFERS[name]
    seen: list[tuple[int, int]] = []

    def backend(gm: Any, inputs: Any) -> Any:
        for node, slot in look(gm).results.items():
            example = node.meta.get("example_value")
            if isinstance(slot, Slot) and isinstance(example, Tensor):
                seen.append((slot.offset, example.storage_offset()))
        return gm

    def run(kv: Tensor) -> Any:
        k, v = parts(kv)
        return k[1:].flatten(0, 1)[2:], v[1:].view(torch.int32).transpose(0, 1)[1:]

    torch.compile(run, backend=backend)(torch.zeros(shape))
    assert len(seen) > 4 and all(ours == theirs for ours, theirs in seen)


# --- by the kernel -----------------------------------------------------------------------------


def main() -> None:
    launches = launching()
    for case in BUFFERS.values():
        torch._dynamo.reset()
        assert stored(*case) == [(ROPE, "store(k,v)")]
    assert launches == ["norm_rope_store_"] * len(BUFFERS)
    print("done")


@pytest.mark.aot
@pytest.mark.long
def test_the_kernel_stores_to_both_parts() -> None:
    done = interpreted(__file__)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stdout + done.stderr


if __name__ == "__main__":
    main()
