"""Show one chain: what fxfuse found in it, what it fused, how exact the result is, and how fast.

    CHAIN = Chain("norm + RoPE", run, inputs)

    if __name__ == "__main__":
        raise SystemExit(main(CHAIN))

An example is a chain of plain PyTorch and these lines; run by hand it prints four lines:

    found  1 × rms_norm + rope + store(k,v)
    fused  attention 1, store 1 by triton
    equal  error 2.1e-07, stock Inductor 2.2e-07; what is not written is bitwise the same
    ratio  1.32 × stock Inductor (41.0 µs, fxfuse 31.1 µs)
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import fxfuse
from fxfuse.bench import timing
from fxfuse.bench.check import InFloat64

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDENED = {torch.float32, torch.bfloat16, torch.float16}
TURNS = 5


@dataclass(frozen=True)
class Chain:
    """A chain as a model or a serving engine spells it.

    name     what it is
    run      the chain: inputs -> one tensor or several, or None where it writes all it makes. Norm
             weights are parameters of a module, or Parameters among the inputs; a table that is
             looked up is a buffer. A module is copied to the device, its parameters to the dtype
    inputs   (device, dtype, tokens) -> fresh inputs, the same values each time
    written  positions of the inputs that the chain writes to (caches; q and k where in place)
    options  settings of fxfuse.Backend
    """

    name: str
    run: Callable[..., Any]
    inputs: Callable[[str, torch.dtype, int], tuple[Tensor, ...]]
    written: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a call returned, and its arguments as it left them."""

    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]


def call(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Result:
    made = run(*inputs)
    outputs = made if isinstance(made, (tuple, list)) else () if made is None else (made,)
    return Result(tuple(outputs), inputs)


def placed(run: Callable[..., Any], device: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The chain on a device; tables keep their dtype."""
    if not isinstance(run, nn.Module):
        return run
    module = copy.deepcopy(run).to(device)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def exact(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Result:
    """The chain's result where inputs and casts to float32 are float64."""
    wide = copy.deepcopy(run).double() if isinstance(run, nn.Module) else run
    with InFloat64():
        return call(wide, tuple(map(widened, inputs)))


def widened(x: Tensor) -> Tensor:
    """x in double precision; slots, positions and float8 stay what they are."""
    return x.to(torch.complex128) if x.is_complex() else x.double() if x.dtype in WIDENED else x


@dataclass(frozen=True)
class Compared:
    """Errors ‖got - want‖ / ‖want‖ of one result, and whether it wrote where it should not."""

    errors: tuple[float, ...]
    stray: bool


def compare(got: Result, want: Result, before: tuple[Tensor, ...], chain: Chain) -> Compared:
    """`before` are the inputs; elements that the exact chain left alone must have the same bits."""
    errors = [relative(a, b) for a, b in zip(got.outputs, want.outputs, strict=True)]
    stray = False
    for i, old in enumerate(before):
        touched = torch.zeros_like(old, dtype=torch.bool)
        if i in chain.written:
            touched = widened(want.inputs[i]) != widened(old)
            errors.append(relative(got.inputs[i][touched], want.inputs[i][touched]))
        stray |= not same_bits(got.inputs[i][~touched], old[~touched])
    return Compared(tuple(errors), stray)


def relative(got: Tensor, want: Tensor) -> float:
    got, want = (x if x.is_complex() else x.double() for x in (got, want))
    return float((got - want).norm() / want.norm()) if want.numel() else 0.0


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))


def one_rounding(result: Result, chain: Chain) -> list[float]:
    """The unit roundoff of each output and each written input."""
    made = (*result.outputs, *(result.inputs[i] for i in sorted(chain.written)))
    return [torch.finfo(x.dtype).eps / 2 if x.dtype.is_floating_point else 0.0 for x in made]


# --- times -------------------------------------------------------------------------------------


def times(
    chain: Chain, runs: Mapping[str, Any], device: str, dtype: torch.dtype, tokens: int
) -> dict[str, float]:
    """Median µs of a call, all runs in turns."""
    if device == "cpu":
        return clocked(chain, runs, dtype, tokens)
    moved_bytes = sum(x.nbytes for x in chain.inputs(device, dtype, tokens))
    sets = timing.buffer_count(device, moved_bytes, tokens)
    buffers = [chain.inputs(device, dtype, tokens) for _ in range(sets)]
    count = timing.call_count(sets, moved_bytes, timing.copy_bytes_per_us(device))
    samplers = {name: sampler(run, buffers, count) for name, run in runs.items()}
    return {name: s.median for name, s in timing.interleaved(samplers, rounds=20).items()}


def sampler(run: Any, buffers: Sequence[tuple[Tensor, ...]], count: int) -> timing.Sampler:
    return timing.sampler("cuda", [functools.partial(run, *inputs) for inputs in buffers], count)


def clocked(
    chain: Chain, runs: Mapping[str, Any], dtype: torch.dtype, tokens: int
) -> dict[str, float]:
    inputs = chain.inputs("cpu", dtype, tokens)
    timers = {
        name: Timer("run(*inputs)", globals={"run": r, "inputs": inputs})
        for name, r in runs.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, timer in timers.items():
            samples[name].append(1e6 * timer.blocked_autorange(min_run_time=0.02).median)
    return {name: statistics.median(us) for name, us in samples.items()}


# --- the four lines ----------------------------------------------------------------------------


def found(report: fxfuse.Report) -> str:
    """Sites by their stages; what was refused or left, with its reason."""
    sites = Counter(" + ".join(site.stages) for site in report.fused)
    parts = [f"{n} × {stages}" for stages, n in sites.items()]
    parts += [f"refused {n} × {r}" for r, n in Counter(map(str, report.refused)).items()]
    parts += [f"left {n} × {x}" for x, n in Counter(left.reason for left in report.left).items()]
    return "; ".join(parts) or "nothing"


def fused(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    new = {kind: n - before.get(kind, 0) for kind, n in after.items()}
    return ", ".join(f"{kind} {n}" for kind, n in new.items() if n) or "nothing"


@torch.no_grad()
def show(chain: Chain, device: str, dtype: torch.dtype, tokens: int) -> bool:
    """Print the four lines; whether something was fused and is as exact as stock Inductor's."""

    def fresh() -> tuple[Tensor, ...]:
        return chain.inputs(device, dtype, tokens)

    run = placed(chain.run, device, dtype)
    how = {"dynamic": False, "fullgraph": True}
    stock = torch.compile(run, **how)
    ours = torch.compile(run, backend=fxfuse.Backend(**chain.options), **how)
    counts = fxfuse.counts()
    result = call(ours, fresh())
    report, new = fxfuse.last_report(), fused(counts, fxfuse.counts())
    assert report is not None
    print(f"found  {found(report)}")
    by = ", ".join(sorted({site.provider for site in report.fused}))
    print(f"fused  {new} by {by or 'nobody'}")

    want = exact(run, fresh())
    mine, theirs = (compare(r, want, fresh(), chain) for r in (result, call(stock, fresh())))
    limits = [e + u for e, u in zip(theirs.errors, one_rounding(result, chain), strict=True)]
    right = not mine.stray and all(e <= u for e, u in zip(mine.errors, limits, strict=True))
    bits = "ELSEWHERE TOO WAS WRITTEN" if mine.stray else "what is not written is bitwise the same"
    print(f"equal  error {max(mine.errors):.1e}, stock Inductor {max(theirs.errors):.1e}; {bits}")

    us = times(chain, {"stock": stock, "fxfuse": ours}, device, dtype, tokens)
    ratio = us["stock"] / us["fxfuse"]
    print(
        f"ratio  {ratio:.2f} × stock Inductor ({us['stock']:.1f} µs, fxfuse {us['fxfuse']:.1f} µs)"
    )
    return bool(report.fused) and right


def main(chain: Chain) -> int:
    """The exit status: 1 where nothing was fused, or the error is larger than stock Inductor's by
    more than one rounding.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=chain.name)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="float32 on a CPU, else bfloat16")
    asked = parser.parse_args()
    dtype = asked.dtype or ("bfloat16" if asked.device == "cuda" else "float32")
    print(f"{chain.name}: {asked.tokens} tokens, {dtype}, {asked.device}")
    return 0 if show(chain, asked.device, DTYPES[dtype], asked.tokens) else 1
