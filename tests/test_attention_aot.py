"""The kernel of attention with one query row compiled for every target, without a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from fxfuse.lowering import attention_launch
from fxfuse.lowering.attention_launch import Block
from tests.decode_sites import Shape, tensors

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from tests.test_kernels_aot import TARGETS, source, written_arguments  # noqa: E402

pytestmark = pytest.mark.aot

SHAPES = {
    "qwen3": (Shape(16, 8, 128, 1024), None),
    "long": (Shape(32, 8, 128, 4096), None),
    "gemma": (Shape(16, 8, 256, 4096, "window", is_boolean=False), None),
    "batch": (Shape(16, 8, 128, 1024, "padded", batch=32), None),
    "by sums": (Shape(32, 8, 80, 1000), Block(16, 4, 2, 8, cores=False)),
    "by head": (Shape(64, 8, 64, 512, "heads", slots_first=True), None),
    "no mask": (Shape(16, 8, 96, 1024, ""), None),
}
OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
# One CUDA and one HIP target take every shape, the others one of them.
COMPILED = [
    pytest.param(name, target, id=f"{name}-{target[1]}")
    for name in SHAPES
    for target in TARGETS
    if name == "qwen3" or target[1] in (90, "gfx942")
]


def compiled(name, target, dtype=torch.bfloat16):
    shape, block = SHAPES[name]
    arch = f"sm_{target[1]}" if target[0] == "cuda" else target[1]
    plan, *_ = attention_launch.on_tensors(tensors(shape, dtype), None, block, arch)
    options = {**OPTIONS, "num_warps": plan.warps}
    return plan, triton.compile(source(plan), target=GPUTarget(*target), options=options)


@pytest.mark.parametrize(("name", "target"), COMPILED)
def test_it_compiles(name, target):
    _, found = compiled(name, target)
    assert found.asm["ptx" if target[0] == "cuda" else "amdgcn"]


@pytest.mark.parametrize("rows", [1, 8, 100, 128, 1000])
@pytest.mark.parametrize("slots", [1, 500, 1024, 4096, 100_000])
@pytest.mark.parametrize("row_bytes", [128, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_launch_table_has_programs_and_memory_for_every_target(rows, slots, row_bytes, target):
    block = attention_launch.block_for(rows, slots, row_bytes, target)
    assert 1 <= rows * block.splits <= max(rows, attention_launch.PROGRAMS)
    assert block.slots * block.stages * row_bytes <= attention_launch.room(target)
    for n in (block.slots, block.splits, block.warps):
        assert n & (n - 1) == 0
    assert block.splits == 1 or rows <= 1024, "a counter for each head"


def test_float32_compiles():
    assert compiled("qwen3", ("cuda", 90, 32), torch.float32)[1].asm["ptx"]


def test_k_and_v_are_loaded_wide_and_the_count_is_released_and_acquired():
    _, found = compiled("long", ("cuda", 90, 32))
    ptx = found.asm["ptx"]
    copies = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*", ptx)
    assert copies and all("0x10" in copy for copy in copies)
    (count,) = re.findall(r"atom\.global\S*", ptx)
    assert count == "atom.global.gpu.acq_rel.add.u32"
    # A barrier between a chunk's parts and the count, and one behind it.
    before, after = ptx.split(count)
    assert "st.global" in before[: before.rindex("bar.sync")] and "bar.sync" in after


@pytest.mark.parametrize("name", SHAPES)
def test_inductor_sees_only_result_and_workspace_as_written(name):
    shape, block = SHAPES[name]
    plan, *_ = attention_launch.on_tensors(tensors(shape, torch.bfloat16), None, block)
    workspace = (
        {"parts_ptr", "stats_ptr", "counters_ptr"} if plan.constants["SPLITS"] > 1 else set()
    )
    assert written_arguments(plan) == {"out_ptr"} | workspace
