"""Every specialisation of the Triton kernel compiled for every target, without a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import sympy
import torch

from tests.sites import SITES, Operands, operands

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompilationError  # noqa: E402

from fxfuse.lowering import kernels, launch, providers  # noqa: E402
from fxfuse.lowering.launch_stores import FORMATS  # noqa: E402
from fxfuse.lowering.operand import Operand  # noqa: E402
from fxfuse.lowering.tiles import Tile  # noqa: E402
from fxfuse.patterns.record import Pass  # noqa: E402

pytestmark = pytest.mark.aot

TARGETS = [("cuda", arch, 32) for arch in (80, 90, 100)]
TARGETS += [("hip", arch, 64) for arch in ("gfx942", "gfx950")] + [("hip", "gfx1100", 32)]
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
POINTERS |= {torch.int32: "*i32", torch.bool: "*i1"}
POINTERS |= {torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5"}
# One CUDA and one HIP target take every site, the others two of them.
EVERYWHERE = ("qwen3", "gptj, partial")
AHEAD = Tile(2, 4, 4, ahead=True)
# How many tokens each target's kernels are compiled for: many (and strides not known), a few,
# elsewhere one.
TOKENS = {90: 128, "gfx942": 16}
COMPILED = [
    (name, target)
    for name in SITES
    for target in TARGETS
    if name in EVERYWHERE or target[1] in (90, "gfx942")
]


def planned(case: Operands, symbolic: bool = False, tile: Tile | None = None) -> launch.Launch:
    """The launch; symbolic as if the strides were not known when it is compiled."""
    q, k = case.tensors["q"], case.tensors["k"]
    tensors = {**case.tensors, "q_out": q}
    if case.record.k and case.record.k.keep:
        tensors["k_out"] = k
    number = sympy.Integer if symbolic else int
    facts = {
        name: Operand(x, tuple(x.shape), tuple(map(number, x.stride())), x.itemsize)
        for name, x in tensors.items()
        if x is not None
    }
    return launch.plan(case.record, facts, case.eps, q.shape[1], tile=tile)


def source(plan: launch.Launch) -> ASTSource:
    """As Inductor compiles it: strides of 1 constant, multiples of 16 told, eps and scale fp64."""
    kernel = launch.kernel_of(plan.kernel)
    names = kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        value: Any = plan.constants.get(name, plan.arguments.get(name))
        if name in plan.constants or (name.startswith("stride") and value == 1):
            signature[name], constants[(i,)] = "constexpr", 1 if value == 1 else value
            continue
        tensor, number = isinstance(value, torch.Tensor), isinstance(value, (int, sympy.Integer))
        is_float = "eps" in name or name == "scale"
        signature[name] = POINTERS[value.dtype] if tensor else ("i32", "fp64")[is_float]
        if tensor or (number and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


@pytest.mark.parametrize(
    ("name", "target"), COMPILED, ids=[f"{name}-{target[1]}" for name, target in COMPILED]
)
def test_kernel_compiles(name, target):
    tokens = TOKENS.get(target[1], 1)
    case = operands(name, heads=16, kv_heads=8, tokens=tokens, slots=256, dtype=torch.bfloat16)
    plan = planned(case, symbolic=target[1] == 90)
    assert (plan.kernel == "norm_rope_store") == (target[1] == 90)
    options = {"num_warps": plan.warps, "num_stages": 1, "enable_fp_fusion": True}
    compiled = triton.compile(source(plan), target=GPUTarget(*target), options=options)
    assert compiled.asm["ptx" if target[0] == "cuda" else "amdgcn"]


@pytest.mark.parametrize("format", [x for x in FORMATS if x])
@pytest.mark.parametrize("target", [*TARGETS, ("cuda", 89, 32)], ids=lambda t: str(t[1]))
def test_the_kernel_declines_the_formats_that_a_target_lacks(target, format, monkeypatch):
    if triton.__version__ < "3.7" and target[0] == "hip" and format.endswith("fnuz"):
        pytest.skip("up to Triton 3.6 a process's first AMD target decides all fnuz casts in it")
    case = operands("8 bits", heads=2, kv_heads=2, tokens=1)
    store = case.record.store
    layouts = {
        name: dataclasses.replace(layout, cast=dataclasses.replace(layout.cast, dtype=format))
        for name, layout in (("k", store.k), ("v", store.v))
    }
    case.record = dataclasses.replace(case.record, store=dataclasses.replace(store, **layouts))
    for name in ("k_cache", "v_cache"):
        case.tensors[name] = case.tensors[name].view(torch.uint8)
    plan = planned(case)
    try:
        options = {"num_warps": plan.warps, "num_stages": 1}
        triton.compile(source(plan), target=GPUTarget(*target), options=options)
        compiles = True
    except CompilationError:
        compiles = False
    monkeypatch.setattr(torch.version, "hip", "7.0" if target[0] == "hip" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if target[0] == "cuda":
        capability = divmod(target[1], 10)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    providers.register()
    facts = providers.Facts(case.record, (2, 2, 2), 2, device=torch.device("cuda"))
    choice = providers.choose("cuda", facts)
    assert (choice.provider == "triton") == compiles
    declined = ("triton", f"Triton does not cast to {format} on this GPU")
    assert compiles or declined in choice.declined


def test_a_v_of_more_runs_than_the_kernel_holds_takes_the_loops():
    record = SITES["gemma4"]
    thirds = tuple(Pass(16 * i, 16 * (2 - i), 16) for i in range(3))
    providers.register()
    for passes, wanted in ((record.v.passes, "triton"), (thirds, "loops")):
        one = dataclasses.replace(record, v=dataclasses.replace(record.v, passes=passes))
        facts = providers.Facts(one, (2, 2, 2), 2, device=torch.device("cuda"))
        assert providers.choose("cuda", facts).provider == wanted


def test_neighbours_and_halves_load_and_store_wide():
    for name in ("qwen3", "flux"):
        case = operands(name, heads=16, kv_heads=8, tokens=1024, slots=1024, dtype=torch.bfloat16)
        plan = planned(case)
        options = {"num_warps": plan.warps, "num_stages": 1, "enable_fp_fusion": True}
        target = GPUTarget("cuda", 90, 32)
        ptx = triton.compile(source(plan), target=target, options=options).asm["ptx"]
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
        assert "st.global.b16" not in ptx


@pytest.mark.parametrize("tile", [(2, 4, 2), (4, 4, 4), (1, 8, 2)])
def test_tables_asked_for_ahead_lie_on_the_threads_of_the_rows(tile):
    """Else they pass through shared memory, behind a barrier of the program."""
    case = operands("qwen3", heads=16, kv_heads=8, tokens=256, slots=256, dtype=torch.bfloat16)
    for name in ("cos", "sin"):
        case.tensors[name] = case.tensors[name].bfloat16().contiguous()
    shared = {}
    for ahead in (False, True):
        plan = planned(case, tile=Tile(*tile, ahead=ahead))
        options = {"num_warps": plan.warps, "num_stages": 1, "enable_fp_fusion": True}
        target = GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source(plan), target=target, options=options)
        shared[ahead] = compiled.metadata.shared
    assert shared[True] == 0 < shared[False]
    # 256 tokens with tables of 16 bits take such a tile, float32 tables do not.
    assert planned(case).constants["SITE"][launch.AHEAD]
    for name in ("cos", "sin"):
        case.tensors[name] = case.tensors[name].float()
    assert not planned(case).constants["SITE"][launch.AHEAD]


def test_rows_wait_for_no_load_that_others_need():
    """Slots are loaded by the programs that store, and bfloat16 is widened in one instruction."""
    case = operands("qwen3", heads=16, kv_heads=8, tokens=256, slots=256, dtype=torch.bfloat16)
    plan = planned(case)
    options = {"num_warps": plan.warps, "num_stages": 1, "enable_fp_fusion": True}
    ptx = triton.compile(source(plan), target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    shared, *_ = ptx.partition("bra ")
    assert "ld.param" in shared and "ld.global" not in shared
    assert "ld.global" in ptx and "cvt.f32.bf16" not in ptx


def test_rows_at_few_positions_of_a_table_are_not_held_for_later_programs():
    def lasting(case):
        return planned(case).constants["SITE"][launch.LASTING]

    few, many = (
        operands("flux", heads=16, kv_heads=16, tokens=n, slots=8, dtype=torch.bfloat16)
        for n in (16, 4096)
    )
    assert lasting(few) and lasting(many)
    for case in (few, many):
        tokens = case.tensors["q"].shape[1]
        case.tensors["positions"] = torch.zeros(1, tokens, dtype=torch.int64)
    assert not lasting(few) and lasting(many)


def written_arguments(plan: launch.Launch) -> set[str]:
    """The pointers that Inductor's own analysis takes for written."""
    driver = mock.Mock()
    driver.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode,
        mock.patch.object(triton.runtime.driver, "_active", driver),
    ):
        arguments = {
            n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for n, x in plan.arguments.items()
        }
        found = _analysed(launch.kernel_of(plan.kernel), {**arguments, **plan.constants})
    return {n for n in found if n.endswith("_ptr")}


def _analysed(kernel: Any, arguments: dict[str, Any]) -> set[str]:
    from torch._higher_order_ops import triton_kernel_wrap

    # 2.13 gives reads and writes, 2.11 the writes alone.
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        found = triton_kernel_wrap.identify_accessed_tensors(kernel, arguments, {})
        return {access.name for access in found.read_writes.writes}
    return set(triton_kernel_wrap.identify_mutated_tensors(kernel, arguments, {}))


@pytest.mark.parametrize("name", SITES)
def test_inductor_sees_only_results_and_caches_as_written(name):
    """Were another tensor taken for written, CUDA graphs would be lost without a word."""
    case = operands(name, heads=16, kv_heads=8, tokens=16, slots=32, dtype=torch.bfloat16)
    # The pointers of absent operands are q again; a name is what counts here.
    written = {"q_out_ptr"}
    if case.record.k and case.record.k.keep:
        written |= {"k_out_ptr"}
    if case.stores:
        written |= {f"{x}_ptr" for x in ("k_cache", "v_cache") if case.tensors[x] is not None}
    for tile in (None, AHEAD):
        assert written_arguments(planned(case, tile=tile)) == written


def test_no_kernel_is_tuned_by_running_it():
    """A tuner with a choice would run a kernel many times over the live cache."""
    from fxfuse.lowering import fused, norm_kernels

    found = [x for m in (kernels, norm_kernels) for x in vars(m).values() if hasattr(x, "run")]
    assert len(found) > 2
    assert {type(kernel) for kernel in found} == {triton.runtime.JITFunction}
    assert len(fused.with_warps("norm_rope_store", 4).configs) == 1
