"""No cache is copied, however it is written to: seen in the code for a CPU, in a GPU's memory."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

import fxfuse
from tests.test_flat import BATCHED, FLAT, ROPE, SETITEMS, D, G, H, Rotated, draw, each

# Many slots, few tokens: nothing but a cache is as large.
T, SLOTS = 5, 512
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")

# How rows are written; axes of rows in front of the tokens; of a cache before and behind its slots.
SPELLINGS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "index_copy_": (FLAT["index_copy_"][0], (), (SLOTS,), ()),
    "index_put_": (FLAT["index_put_"][0], (), (SLOTS,), ()),
    "batched rows, flat cache": (BATCHED["squeeze"][0], (1,), (SLOTS,), ()),
    "setitem, four axes": (SETITEMS["batched, four axes"][0], (1,), (1, SLOTS), ()),
    "setitem, heads first": (SETITEMS["batched, heads first"][0], (1,), (1,), (SLOTS,)),
}


def prepared(name: str, device: str) -> tuple[Any, list[Tensor]]:
    """The toy compiled, and its arguments, the caches last but for the slots."""
    write, lead, before, after = SPELLINGS[name]
    rows = [draw(*lead, T, n, D, seed=i) for i, n in enumerate((H, G, G))]
    caches = [torch.full((*before, G, *after, D), 3.0) for _ in "kv"]
    given = [*rows, torch.arange(T).expand(*lead, -1), *caches, 100 + torch.arange(T)]
    toy = Rotated(each(write)).to(device)
    torch._dynamo.reset()
    return torch.compile(toy, backend=fxfuse.backend), [x.to(device) for x in given]


def fused_whole() -> bool:
    return [f.stages for f in fxfuse.last_report().fused] == [(ROPE, "store(k,v)")]


@pytest.mark.cpu
@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_no_buffer_is_as_large_as_a_cache(name: str) -> None:
    run, given = prepared(name, "cpu")
    with fresh_cache():
        _, [code] = run_and_get_code(run, *given)
    assert fused_whole()
    buffers = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    sizes = [math.prod(int(n) for n in b.split(",") if n.strip()) for b in buffers]
    assert sizes and max(sizes) <= T * H * D < given[4].numel()


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("name", SPELLINGS)
@torch.no_grad()
def test_no_memory_is_allocated_for_a_cache(name: str) -> None:
    run, given = prepared(name, "cuda")
    run(*given)
    assert fused_whole()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(*given)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < given[4].nbytes
