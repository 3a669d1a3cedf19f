"""Layouts, dtypes, sections, slots, strides, head counts and token counts drawn together: the op on
the CPU, and the Triton kernel on a GPU, against what `tests.truth` says in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import fxfuse.ops
from fxfuse.lowering import launch
from fxfuse.lowering.eager import with_stride_arguments
from fxfuse.lowering.tiles import Rows, Tile, tile_for
from tests.drawn_sites import INTEGERS, Drawn, Site, drawn, sites
from tests.sites import Operands
from tests.truth import Numbers, is_one_rounding, truth

HEALTH = list(HealthCheck)
BATCH = st.sampled_from([1, 2, 3, 1, 2, 3, 0])
TOKENS = st.one_of(st.integers(1, 70), st.integers(1, 70), st.integers(0, 3))
SEED = st.integers(0, 2**20)
# A failure is told at once: smaller cases of it would be sought for minutes.
NO_SHRINKING = [p for p in Phase if p not in (Phase.shrink, Phase.explain)]


def outputs(case: Operands, results: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Results and caches by the names that `truth` has."""
    found = {"q_out": results[0]}
    if results[1].dim() == 4:
        found["k_out"] = results[1]
    for cache in ("k_cache", "v_cache") if case.stores else ():
        if case.tensors.get(cache) is not None:
            found[cache] = case.numbers(cache)
    return found


def check(one: Drawn, found: dict[str, Tensor], wanted: dict[str, Numbers]) -> None:
    """Each number is one rounding of float32 arithmetic, and nothing else was written."""
    assert found.keys() == wanted.keys()
    for name, got in found.items():
        assert is_one_rounding(got, wanted[name]), name
        if name in one.pools:
            assert one.canaries(name, torch.from_numpy(wanted[name].written)), name


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(a.view(INTEGERS[a.itemsize]), b.view(INTEGERS[b.itemsize]))


@pytest.mark.null
@pytest.mark.parametrize("examples", [150, pytest.param(2000, marks=pytest.mark.long)])
def test_the_op_is_one_rounding_of_the_truth(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=HEALTH)
    @given(sites(), BATCH, TOKENS, SEED)
    def each(site: Site, batch: int, tokens: int, seed: int) -> None:
        runs = []
        for _ in range(2):
            one = drawn(site, batch, tokens, seed)
            runs.append((one, outputs(one.case, one.case.op()(*one.case.arguments()))))
        check(*runs[0], truth(runs[0][0].case))
        assert all(equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])

    each()


# --- the kernel, launched without Inductor: a compile for each site, not for each call ------------


def launched(one: Drawn, tile: Tile) -> dict[str, Tensor]:
    """Results and caches of one launch; strides are arguments, so that one kernel serves all."""
    from fxfuse.lowering import direct

    case, q = one.case, one.case.tensors["q"]
    assert q is not None
    results = fxfuse.ops.empty_results(q, case.tensors["k"], case.record)
    for result in results:
        result.fill_(torch.nan)
    tensors = {**case.tensors, "q_out": results[0]}
    tensors |= {"k_out": results[1]} if results[1].dim() == 4 else {}
    plan = with_stride_arguments(direct.planned(case.record, tensors, case.eps, tile=tile))
    kernel = unspecialised(tuple(plan.arguments))
    kernel[(*plan.grid, 1)](**plan.arguments, **plan.constants, num_warps=plan.warps, num_stages=1)
    return outputs(case, results)


@functools.cache
def unspecialised(arguments: tuple[str, ...]) -> Any:
    """The kernel of any strides, compiled once whatever its arguments are divisible by."""
    import triton

    from fxfuse.lowering import kernels

    names = list(arguments)
    return triton.jit(
        kernels.norm_rope_store.fn,
        do_not_specialize=names,
        do_not_specialize_on_alignment=names,
    )


def no_less_exact(got: Tensor, plain: Tensor, want: Numbers) -> bool:
    """No error above the plain path's by more than 5 % and a float32 ulp of the largest number."""
    values, rows = torch.from_numpy(want.values), [x.cpu().double() for x in (got, plain)]
    counted = torch.from_numpy(want.written) & rows[0].isfinite() & rows[1].isfinite()
    errors = [float((x - values)[counted].norm()) for x in rows]
    ulp = 3e-7 * abs(want.values).max(initial=0.0) * want.values.size**0.5
    return errors[0] <= 1.05 * errors[1] + ulp


# Rows of a launch by which its tile is chosen: one tile for all calls of a site, one compile.
ROWS = st.sampled_from([1, 600, 1000, 4000, 10_000, 2**20])
CALL = st.tuples(st.integers(1, 3), st.integers(1, 70), SEED)
HARDWARE = ("float8_e4m3fn", "float8_e5m2")


def sites_on_the_kernel(start: int, examples: int, until: float = math.inf) -> int:
    """Draws sites of 40 calls each until that time, and says how many calls were checked."""
    checked = 0

    @seed(start)
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=HEALTH, phases=NO_SHRINKING
    )
    @given(
        sites(HARDWARE),
        ROWS,
        st.booleans(),
        st.booleans(),
        st.lists(CALL, min_size=40, max_size=40),
    )
    def each(
        site: Site, rows: int, wide: bool, ahead: bool, calls: list[tuple[int, int, int]]
    ) -> None:
        nonlocal checked
        q = site.record.q
        heads = min(site.heads, site.kv_heads)
        kind = Rows(q.channels, launch.widest_run(q), heads, wide_tables=wide)
        tile = dataclasses.replace(tile_for("", rows, kind), ahead=ahead)
        for call in calls:
            if time.monotonic() > until:
                return
            one, again, plain = (drawn(site, *call, device="cuda") for _ in range(3))
            found, repeated = launched(one, tile), launched(again, tile)
            assert all(equal(found[name], repeated[name]) for name in found)
            eager = outputs(plain.case, plain.case.op()(*plain.case.arguments()))
            wanted = truth(one.case)
            for name, want in wanted.items():
                assert no_less_exact(found[name], eager[name], want), name
            check(one, found, wanted)
            checked += 1

    each()
    return checked


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("part", range(15))
def test_the_kernel_is_no_less_exact_than_the_plain_path(part: int) -> None:
    """4 sites of 40 calls each, so that 15 workers have 2,400."""
    assert sites_on_the_kernel(part, examples=4) > 0


@pytest.mark.cuda
@pytest.mark.long
@ON_GPU
@pytest.mark.parametrize("part", range(11))
def test_five_minutes_of_sites_on_the_kernel(part: int) -> None:
    """55 minutes for one worker; what each has checked is printed."""
    until = time.monotonic() + 300
    # Rounds, since a longer one would go on drawing when its time is over.
    rounds = itertools.takewhile(lambda _: time.monotonic() < until, itertools.count())
    counts = [sites_on_the_kernel(1000 * (part + 1) + i, 8, until) for i in rounds]
    print(f"{sum(counts)} calls of about {sum(counts) // 40} sites")
    assert sum(counts) > 0
