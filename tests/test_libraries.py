"""Kernels of other libraries: taken where they compute exactly the op, else declined with a reason.

The libraries are invented here, with the signatures and the rounding points of the real ones.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import fxfuse
from fxfuse import reference
from fxfuse.bench import measure, opponents, recipes
from fxfuse.lowering import libraries, providers
from fxfuse.patterns.record import AddNorm, Norm
from tests.norm_toys import Residual, pre_norm
from tests.spellings import gemma, rsqrt, weightless
from tests.toys import hidden_states

PLAIN, GEMMA = Norm("head", "before", True), Norm("head", "before", True, 1.0)
BARE = Norm("head", "before", False)


def normed(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def flashinfer(offset: float) -> Callable[..., Tensor]:
    """flashinfer.norm.rmsnorm and gemma_rmsnorm: one rounding, at the end."""

    def run(
        input: Tensor, weight: Tensor, eps: float = 1e-6, out: Any = None, enable_pdl: Any = None
    ) -> Tensor:
        return (normed(input, eps) * (offset + weight.float())).to(input.dtype)

    return run


def flashinfer_add(offset: float) -> Callable[..., None]:
    """The same of input + residual, in place: the norm is that of the sum in float32."""

    def run(
        input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: Any = None
    ) -> None:
        total = input.float() + residual.float()
        residual.copy_(total)
        input.copy_(normed(total, eps) * (offset + weight.float()))

    return run


def rmsnorm2d_fwd(
    input: Tensor, weight: Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0
) -> Tensor:
    assert use_model_sensitive_rmsnorm == 0
    return (normed(input, epsilon) * weight.float()).to(input.dtype)


def rmsnorm2d_fwd_with_add(
    out: Tensor, input: Tensor, residual_in: Tensor, residual_out: Tensor, weight: Tensor,
    epsilon: float,
) -> None:  # fmt: skip
    total = input.float() + residual_in.float()
    residual_out.copy_(total)
    out.copy_(normed(total, epsilon) * weight.float())


def rms_norm(out: Tensor, input: Tensor, weight: Tensor, epsilon: float) -> None:
    out.copy_(normed(input, epsilon).to(input.dtype) * weight)


def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    residual += input
    rms_norm(input, residual, weight, epsilon)


MODULES: dict[str, dict[str, Any]] = {
    "flashinfer": {},
    "flashinfer.norm": {
        "rmsnorm": flashinfer(0.0),
        "gemma_rmsnorm": flashinfer(1.0),
        "fused_add_rmsnorm": flashinfer_add(0.0),
        "gemma_fused_add_rmsnorm": flashinfer_add(1.0),
    },
    "aiter": {
        "rmsnorm2d_fwd": rmsnorm2d_fwd,
        "rmsnorm2d_fwd_with_add": rmsnorm2d_fwd_with_add,
    },
    "vllm": {},
    "vllm._custom_ops": {"rms_norm": rms_norm, "fused_add_rms_norm": fused_add_rms_norm},
}
BY_NAME = {library.name: library for library in libraries.LIBRARIES}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    libraries._tried.cache_clear()
    with torch.no_grad(), fresh_cache():
        yield
    libraries._tried.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Installs a library for the CPU, or one with other functions; gives back who was called."""

    def install(name: str, **other: Any) -> list[str]:
        calls: list[str] = []
        for module, functions in MODULES.items():
            if module.split(".")[0] != name:
                continue
            made = ModuleType(module)
            made.__spec__ = ModuleSpec(module, None, is_package=True)
            for key, function in (functions | other if functions else functions).items():
                setattr(made, key, noting(calls, key, function))
            monkeypatch.setitem(sys.modules, module, made)
        library = BY_NAME[name]
        monkeypatch.setattr(libraries, "platform", lambda: library.platforms[0])
        table = [
            dataclasses.replace(p, devices=frozenset({"cpu"})) if p.name == name else p
            for p in providers.PROVIDERS
        ]
        monkeypatch.setattr(providers, "PROVIDERS", table)
        return calls

    return install


def noting(calls: list[str], key: str, function: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(key)
        return function(*args, **kwargs)

    return run


def tensors(record: AddNorm, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    names = ("x", "residual", "second")[: record.addends]
    found: dict[str, Any] = dict.fromkeys(("x", "residual", "second", "weight"))
    for name in names:
        found[name] = torch.randn(4, 16, record.channels, generator=generator).to(dtype)
    if record.norm.has_weight:
        found["weight"] = torch.randn(record.channels, generator=generator).to(dtype)
    return found


def record_of(norm: Norm, addends: int, dtype: str) -> AddNorm:
    return AddNorm(200, norm, addends, keep_sum=addends > 1, dtype=dtype)


def reason_of(name: str, record: AddNorm, given: dict[str, Any]) -> str | None:
    """Why a library declines a record, None where it takes it."""
    choice = providers.choose("cpu", providers.facts_of(record, given))
    return None if choice.provider == name else dict(choice.declined)[name]


FUSED_FLOAT = "its kernel norms the sum before it is rounded"
TWICE = "its kernel rounds the normed row before the weight"
NO_GEMMA = "it has no kernel for a weight of 1 + w in float32"
NO_SUM = "it has no kernel that adds up 3 tensors"
CASES = [
    ("flashinfer", PLAIN, 1, "bfloat16", None),
    ("flashinfer", PLAIN, 1, "float16", None),
    ("flashinfer", GEMMA, 1, "bfloat16", None),
    ("flashinfer", PLAIN, 2, "bfloat16", FUSED_FLOAT),
    ("flashinfer", GEMMA, 2, "float16", FUSED_FLOAT),
    ("flashinfer", PLAIN, 3, "bfloat16", NO_SUM),
    ("flashinfer", PLAIN, 1, "float32", "its kernel knows bfloat16, float16 only"),
    ("flashinfer", BARE, 1, "bfloat16", "its kernel wants a weight"),
    ("aiter", PLAIN, 1, "bfloat16", None),
    ("aiter", GEMMA, 1, "bfloat16", NO_GEMMA),
    ("aiter", PLAIN, 2, "bfloat16", FUSED_FLOAT),
    ("vllm", PLAIN, 1, "bfloat16", TWICE),
    ("vllm", PLAIN, 2, "float16", TWICE),
    ("vllm", GEMMA, 1, "float32", NO_GEMMA),
    ("vllm", GEMMA, 2, "bfloat16", NO_GEMMA),
    ("vllm", PLAIN, 1, "float32", None),
    ("vllm", PLAIN, 2, "float32", None),
    ("vllm", BARE, 1, "bfloat16", None),
    ("vllm", BARE, 2, "bfloat16", None),
    ("vllm", BARE, 3, "bfloat16", NO_SUM),
]


@pytest.mark.null
@pytest.mark.parametrize(("name", "norm", "addends", "dtype", "reason"), CASES)
def test_what_is_taken_equals_the_op_and_what_is_not_has_a_reason(
    name: str, norm: Norm, addends: int, dtype: str, reason: str | None, installed: Any
) -> None:
    installed(name)
    record = record_of(norm, addends, dtype)
    given = tensors(record, getattr(torch, dtype))
    assert reason_of(name, record, given) == reason
    kernels = [k for k in BY_NAME[name].kernels if k.addends == addends]
    if reason in (None, FUSED_FLOAT, TWICE):
        # Whichever rounding decided, the numbers say the same.
        kernel = next(k for k in kernels if k.offset == norm.weight_offset)
        rows = [None if t is None else t.reshape(-1, 200) for t in (given["x"], given["residual"])]
        call: Any = (*given.values(), 1e-5, record)
        want_sum, want = reference.add_rms_norm(*call)
        total, got = kernel.call(*rows, given["weight"], 1e-5)
        assert libraries._rounds_alike(got, want.reshape(-1, 200)) == (reason is None)
        assert total is None or torch.equal(total, want_sum.reshape(-1, 200))


@pytest.mark.null
def test_one_plus_w_of_the_parameters_dtype_is_another_weight() -> None:
    """What vLLM's callers pass for Gemma: bfloat16 has no 1 + 2**-8."""
    w = torch.tensor([0.00390625]).bfloat16()
    assert (1 + w).float() != 1 + w.float()


@pytest.mark.null
def test_dtypes_that_differ_and_packages_that_are_absent(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("flashinfer")
    record = record_of(PLAIN, 1, "bfloat16")
    given = tensors(record, torch.bfloat16)
    mixed = given | {"weight": given["weight"].float()}
    wanted = "its kernels know one dtype, not bfloat16, float32"
    assert reason_of("flashinfer", record, mixed) == wanted
    monkeypatch.setattr(libraries, "platform", lambda: "rocm")
    assert reason_of("flashinfer", record, given) == "not for rocm"
    monkeypatch.undo()
    choice = providers.choose("cuda", providers.facts_of(record, given))
    assert dict(choice.declined)["flashinfer"] == "flashinfer is not installed"


@pytest.mark.null
def test_a_library_that_changed_its_rounding_is_seen_before_it_is_used(installed: Any) -> None:
    def twice(input: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return normed(input, epsilon).to(input.dtype) * weight

    def doubled(input: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return 2 * rmsnorm2d_fwd(input, weight, epsilon)

    record = record_of(PLAIN, 1, "bfloat16")
    given = tensors(record, torch.bfloat16)
    for wrong in (twice, doubled):
        libraries._tried.cache_clear()
        installed("aiter", rmsnorm2d_fwd=wrong)
        reason = reason_of("aiter", record, given)
        assert reason == "tried on a few rows, its norm is another"


@pytest.mark.null
@pytest.mark.parametrize("recipe", ["add_norm", "qk_norm"])
def test_the_bench_calls_flashinfer_too(recipe: str, installed: Any) -> None:
    calls = installed("flashinfer")
    for case in recipes.cases(recipe, "cpu", [5]):
        row = measure.measure(case, "cpu", [opponents.OPPONENTS["flashinfer"]], 1, 1e3)
        assert row.figures["flashinfer"].wrong is None
    kernels = {"add_norm": flashinfer_add, "qk_norm": flashinfer}
    assert {MODULES["flashinfer.norm"][c].__qualname__.split(".")[0] for c in calls} == {
        kernels[recipe].__name__
    }


# --- in compiled graphs ------------------------------------------------------------------------


def run(toy: nn.Module, dtype: torch.dtype) -> fxfuse.Report:
    """The report of a compile whose error is no larger than eager's."""
    torch._dynamo.reset()
    toy, x = toy.to(dtype), hidden_states(9, width=96).to(dtype)
    wide = hidden_states(9, width=96).to(dtype).double()
    got = torch.compile(toy, backend=fxfuse.Backend(gate="always"))(x)
    eager = toy(x)
    want = toy.double()(wide)

    def error(y: Tensor) -> float:
        return float((y.double() - want).norm() / want.norm())

    # 5 %, and a float32 ulp where all errors are next to nothing.
    assert error(got) <= 1.05 * error(eager) + 2e-7
    report = fxfuse.last_report()
    assert report is not None
    return report


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("name", "norm", "dtype", "taken"),
    [
        ("flashinfer", rsqrt, torch.bfloat16, ["flashinfer", "loops", "loops"]),
        ("flashinfer", gemma, torch.bfloat16, ["flashinfer", "loops", "loops"]),
        ("aiter", rsqrt, torch.bfloat16, ["aiter", "loops", "loops"]),
        ("vllm", rsqrt, torch.float32, ["vllm", "vllm", "vllm"]),
        ("vllm", weightless, torch.bfloat16, ["vllm", "vllm", "vllm"]),
        ("vllm", gemma, torch.bfloat16, ["loops", "loops", "loops"]),
    ],
)
def test_in_a_model(name: str, norm: Any, dtype: Any, taken: list[str], installed: Any) -> None:
    calls = installed(name)
    report = run(Residual(pre_norm, norm, width=96), dtype)
    assert [f.provider for f in report.fused] == taken
    # Each of its kernels is tried once, too.
    assert len(calls) == (0 if name not in taken else taken.count(name) + len(set(calls)))
    declined = [r for f in report.fused for p, r in f.declined if p == name]
    assert len(declined) == taken.count("loops")
    assert all(f"by {name}: {reason}" in str(report) for reason in declined)


@pytest.mark.cpu
def test_a_library_that_raises_is_dropped(installed: Any, caplog: pytest.LogCaptureFixture) -> None:
    def six_arguments(out: Any, x: Any, residual_out: Any, residual: Any, w: Any, eps: Any) -> None:
        raise AssertionError

    installed("vllm", fused_add_rms_norm=six_arguments)
    with caplog.at_level(logging.WARNING, "fxfuse"):
        report = run(Residual(pre_norm, width=96), torch.float32)
    assert [f.provider for f in report.fused] == ["vllm", "loops", "loops"]
    assert "failed declining: TypeError" in dict(report.fused[1].declined)["vllm"]
    assert len([m for m in caplog.messages if "provider vllm is asked no more" in m]) == 1
