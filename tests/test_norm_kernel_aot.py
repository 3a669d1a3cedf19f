"""The kernel of add_rms_norm compiled for every target, without a GPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from tests.add_norms import CASES, EPS

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fxfuse import add_norm  # noqa: E402
from fxfuse.lowering import launch, norm_kernels, norm_launch  # noqa: E402
from fxfuse.lowering.operand import Operand  # noqa: E402
from tests.test_kernels_aot import TARGETS  # noqa: E402

pytestmark = pytest.mark.aot

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def planned(name: str) -> launch.Launch:
    case = CASES[name]
    tensors = {n: t for n, t in case.tensors().items() if t is not None}
    addends = [t for n, t in tensors.items() if n != "weight"]
    total, out = add_norm.empty_results(addends, case.record)
    tensors |= {"out": out} | ({"sum": total} if case.record.keep_sum else {})
    facts = {n: Operand.of(t) for n, t in tensors.items()}
    rows = addends[0].numel() // case.record.channels
    return norm_launch.plan(case.record, facts, case.dtypes, EPS, rows)


def compiled(plan: launch.Launch, target: tuple[Any, ...]) -> Any:
    """As Inductor compiles it: strides of 1 constant, multiples of 16 told, eps fp64."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(norm_kernels.add_rms_norm.arg_names):
        value: Any = plan.constants.get(name, plan.arguments.get(name))
        if name in plan.constants or (name.startswith("stride") and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = POINTERS[value.dtype] if tensor else ("i32", "fp64")["eps" in name]
        if tensor or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        norm_kernels.add_rms_norm, signature=signature, constexprs=constants, attrs=attributes
    )
    options = {"num_warps": plan.warps, "num_stages": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget(*target), options=options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", TARGETS, ids=[str(t[1]) for t in TARGETS])
def test_kernel_compiles(name, target):
    assert compiled(planned(name), target).asm["ptx" if target[0] == "cuda" else "amdgcn"]


def test_rows_load_and_store_wide_and_the_norm_reads_the_rounded_sum():
    ptx = compiled(planned("llama"), ("cuda", 90, 32)).asm["ptx"]
    # 320 channels over 128 threads of a block of 512: four a thread.
    assert "ld.global.v2.b32" in ptx and "st.global.v2.b32" in ptx
    assert "cvt.rn.bf16" in ptx


@pytest.mark.parametrize("name", CASES)
def test_inductor_sees_only_results_as_written(name):
    """Were another tensor taken for written, CUDA graphs would be lost without a word."""
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    plan, kernel = planned(name), norm_kernels.add_rms_norm
    driver = mock.Mock()
    driver.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode,
        mock.patch.object(triton.runtime.driver, "_active", driver),
    ):
        arguments = {
            n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for n, x in plan.arguments.items()
        } | plan.constants
        # 2.13 gives reads and writes, 2.11 the writes alone.
        if hasattr(wrap, "identify_accessed_tensors"):
            found = wrap.identify_accessed_tensors(kernel, arguments, {}).read_writes.writes
            names = {access.name for access in found}
        else:
            names = set(wrap.identify_mutated_tensors(kernel, arguments, {}))
    kept = {"sum_ptr"} if CASES[name].record.keep_sum else set()
    assert {n for n in names if n.endswith("_ptr")} == {"out_ptr"} | kept
