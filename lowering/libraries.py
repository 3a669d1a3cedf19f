"""Kernels of other libraries for fxfuse::add_rms_norm, taken where they compute exactly the op.

One entry says what a library's kernel adds up, what it adds to the weight, where it rounds and how
it is called; a call whose record asks for anything else is declined with the reason. What is taken
was tried once on a few rows beside the reference.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import fxfuse.add_norm
from fxfuse import reference
from fxfuse.lowering.providers import Facts, Provider, register_provider
from fxfuse.patterns.record import AddNorm

HALF = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of one norm, of x or of x + residual.

    call          of rows x, residual (None without a sum), weight and eps, to sum and norm; rows
                  are [N, D] and dense
    addends       how many tensors it adds up
    offset        what it adds to the weight, in float32
    dtypes        that it knows; all its tensors have one
    rounded_sum   whether it norms the sum as it was rounded
    rounded_norm  whether it rounds the normed row before the weight
    weightless    whether it works without a weight
    """

    call: Callable[..., tuple[Tensor | None, Tensor]]
    addends: int = 1
    offset: float = 0.0
    dtypes: tuple[str, ...] = HALF
    rounded_sum: bool = True
    rounded_norm: bool = False
    weightless: bool = False

    def differs(self, record: AddNorm) -> str | None:
        """Where it computes something else than the op of as many addends, or None."""
        has_weight, exact = record.norm.has_weight, record.dtype == "float32"
        if not has_weight and not self.weightless:
            return "its kernel wants a weight"
        if record.dtype not in self.dtypes:
            return f"its kernel knows {', '.join(self.dtypes)} only"
        if not self.rounded_sum and record.addends > 1 and not exact:
            return "its kernel norms the sum before it is rounded"
        if self.rounded_norm and has_weight and not exact:
            return "its kernel rounds the normed row before the weight"
        return None


@dataclasses.dataclass(frozen=True)
class Library:
    """A package with kernels, and the platforms it is for: "cuda", "rocm"."""

    name: str
    module: str
    platforms: tuple[str, ...]
    kernels: tuple[Kernel, ...]

    def installed(self) -> bool:
        package, *inside = self.module.split(".")
        return importlib.util.find_spec(package) is not None and (
            not inside or importlib.util.find_spec(self.module) is not None
        )


def platform() -> str:
    """What torch calls "cuda" here."""
    return "cuda" if torch.version.hip is None else "rocm"


def _of(module: str, function: str) -> Any:
    return getattr(import_module(module), function)


def _flashinfer(function: str) -> Callable[..., tuple[None, Tensor]]:
    def call(x: Tensor, residual: None, weight: Tensor, eps: float) -> tuple[None, Tensor]:
        return None, _of("flashinfer.norm", function)(x, weight, eps)

    return call


def _flashinfer_add(function: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """In place: the sum where the residual was, the norm where x was."""

    def call(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual = x.clone(), residual.clone()
        _of("flashinfer.norm", function)(x, residual, weight, eps)
        return residual, x

    return call


def _aiter(x: Tensor, residual: None, weight: Tensor, eps: float) -> tuple[None, Tensor]:
    return None, _of("aiter", "rmsnorm2d_fwd")(x, weight, eps)


def _aiter_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    _of("aiter", "rmsnorm2d_fwd_with_add")(out, x, residual, total, weight, eps)
    return total, out


def _vllm(
    x: Tensor, residual: None, weight: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor]:
    out = torch.empty_like(x)
    _of("vllm._custom_ops", "rms_norm")(out, x, _or_ones(weight, x), eps)
    return None, out


def _vllm_add(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor]:
    """In place, as FlashInfer's."""
    x, residual = x.clone(), residual.clone()
    _of("vllm._custom_ops", "fused_add_rms_norm")(x, residual, _or_ones(weight, x), eps)
    return residual, x


def _or_ones(weight: Tensor | None, x: Tensor) -> Tensor:
    return x.new_ones(x.shape[-1]) if weight is None else weight


# FlashInfer's and aiter's fused kernels hold the sum in float32 and norm that; vLLM's reads it back
# as rounded, and rounds again before it multiplies by the weight.
VLLM = functools.partial(Kernel, dtypes=("float32", *HALF), rounded_norm=True, weightless=True)
LIBRARIES = (
    Library(
        "vllm", "vllm._custom_ops", ("rocm",), (VLLM(_vllm, addends=1), VLLM(_vllm_add, addends=2))
    ),
    Library(
        "aiter",
        "aiter",
        ("rocm",),
        (Kernel(_aiter), Kernel(_aiter_add, addends=2, rounded_sum=False)),
    ),
    Library(
        "flashinfer",
        "flashinfer.norm",
        ("cuda",),
        (
            Kernel(_flashinfer("rmsnorm")),
            Kernel(_flashinfer("gemma_rmsnorm"), offset=1.0),
            Kernel(_flashinfer_add("fused_add_rmsnorm"), addends=2, rounded_sum=False),
            Kernel(
                _flashinfer_add("gemma_fused_add_rmsnorm"),
                addends=2,
                offset=1.0,
                rounded_sum=False,
            ),
        ),
    ),
)


def enter(library: Library, devices: tuple[str, ...] = ("cuda",)) -> Provider:
    """Enter a library into the table of providers."""
    return register_provider(
        library.name,
        functools.partial(_run, library),
        ops=("add_rms_norm",),
        devices=devices,
        declines=functools.partial(_declines, library),
        version="",
    )


def _declines(library: Library, facts: Facts) -> str | None:
    record = facts.record
    assert isinstance(record, AddNorm)
    if platform() not in library.platforms:
        return f"not for {platform()}"
    if not library.installed():
        return f"{library.name} is not installed"
    dtypes = {str(dtype).removeprefix("torch.") for dtype in facts.dtypes.values()}
    if dtypes != {record.dtype}:
        return f"its kernels know one dtype, not {', '.join(sorted(dtypes | {record.dtype}))}"
    kernel = _kernel(library, record)
    if isinstance(kernel, str):
        return kernel
    return _tried(kernel, dataclasses.replace(record, keep_sum=True), facts.device)


def _kernel(library: Library, record: AddNorm) -> Kernel | str:
    """The kernel that computes a record, or why there is none."""
    norm = record.norm
    adding = [k for k in library.kernels if k.addends == record.addends]
    fitting = [k for k in adding if not norm.has_weight or k.offset == norm.weight_offset]
    if not adding:
        return f"it has no kernel that adds up {record.addends} tensors"
    if not fitting:
        return "it has no kernel for a weight of 1 + w in float32"
    return fitting[0].differs(record) or fitting[0]


@functools.lru_cache(maxsize=256)
def _tried(kernel: Kernel, record: AddNorm, device: torch.device | None) -> str | None:
    """Why a kernel is not what its entry says, from three rows of numbers; None where it is."""
    dtype, d = getattr(torch, record.dtype), record.channels
    numbers = torch.arange(3 * d, device=device or "cpu", dtype=torch.float32).view(3, d)
    x, residual = (numbers.mul(step).sin().to(dtype) for step in (0.7, 1.3))
    weight = numbers[0].mul(0.9).cos().to(dtype) if record.norm.has_weight else None
    addend = residual if record.addends > 1 else None
    want_sum, want = reference.add_rms_norm(x, addend, None, weight, EPS, record)
    total, normed = kernel.call(x.clone(), addend, weight, EPS)
    if record.addends > 1 and not (total is not None and torch.equal(total, want_sum)):
        return "tried on a few rows, its sum is another"
    return None if _rounds_alike(normed, want) else "tried on a few rows, its norm is another"


def _rounds_alike(got: Tensor, want: Tensor) -> bool:
    """Whether two results differ by the order of float32 sums alone: seldom, and by one unit in the
    last place. Another rounding point shows in every tenth element or more.
    """
    unit = max(torch.finfo(want.dtype).eps, 2**-20) * want.double().abs().clamp_min(2**-6)
    near = bool(((got.double() - want.double()).abs() <= unit).all())
    seldom = int((got != want).sum()) <= max(1, want.numel() // 50)
    return near and (seldom or want.dtype == torch.float32)


EPS = 1e-5


def _run(
    library: Library,
    *,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    record: AddNorm,
    **rest: Any,
) -> tuple[Tensor | None, Tensor]:
    kernel = _kernel(library, record)
    assert isinstance(kernel, Kernel), kernel
    if x.numel() == 0:
        return fxfuse.add_norm.empty_results([x], record)
    rows = [None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (x, residual)]
    assert rows[0] is not None
    weight = None if weight is None else weight.contiguous()
    total, normed = kernel.call(rows[0], rows[1], weight, eps)
    if not record.keep_sum:
        return None, normed.view(x.shape)
    return (x if total is None else total.view(x.shape)), normed.view(x.shape)
