"""Correctness of one opponent on one case, against the same chain in float64.

    error = max over outputs and stored rows of ‖got - want‖ / ‖want‖

Memory that outputs will be given is NaN before, so are the slots of a cache that are to be
written; all others must keep what they held.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxfuse.bench.chains import FP8, Chain
from fxfuse.bench.recipes import Inputs

# A fused chain rounds less often than eager does; what is left is chance.
SLACK = 1.05
# bfloat16 keeps 8 bits, 2e-3 a rounding; nothing right is further off.
LARGEST = 2e-2


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a check compares with: float64 results, and the error that eager makes."""

    outputs: tuple[Tensor, ...]
    eager_error: float


class InFloat64(TorchFunctionMode):
    """Casts to float32 are casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{name: wide(x) for name, x in (kwargs or {}).items()})


def truth(chain: Chain, inputs: Inputs) -> Truth:
    """The chain in float64, and eager's error in the working dtype."""
    exact = copy.deepcopy(chain).double()
    wide = _with(inputs, lambda x: x.double() if x.is_floating_point() else x)
    with InFloat64():
        outputs = results(exact, wide)
    error, _ = _compare(chain, inputs, outputs)
    return Truth(outputs, error)


def check(run: Any, inputs: Inputs, wanted: Truth, *, in_place: bool) -> tuple[float, str | None]:
    """The error of one run, and what is wrong with it, if anything is."""
    error, wrong = _compare(run, inputs, wanted.outputs, in_place=in_place)
    if wrong:
        return error, wrong
    limit = min(SLACK * wanted.eager_error, LARGEST)
    return error, None if error <= limit else f"error {error:.2e}, eager's is {limit / SLACK:.2e}"


def results(run: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """What a run returns, then the rows it stored."""
    made = run(*inputs.args)
    outputs = made if isinstance(made, tuple) else (made,)
    return (*outputs, *(_stored(c, inputs) for c in inputs.laid_by_slot()))


def _compare(
    run: Any, inputs: Inputs, wanted: tuple[Tensor, ...], *, in_place: bool = False
) -> tuple[float, str | None]:
    """The largest relative error of a run on a copy of the inputs whose slots are poisoned."""
    fresh = _with(inputs, lambda x: x)
    for cache in fresh.caches if not fresh.by_slot else ():
        cache.index_fill_(fresh.axis, _slots(fresh), torch.nan)
    kept = _with(fresh, lambda x: x)
    _poison(wanted, fresh.args[0].dtype)
    got = results(run, fresh)
    for cache, old in zip(fresh.laid_by_slot(), kept.laid_by_slot(), strict=True):
        if not torch.equal(_others(cache, fresh), _others(old, kept)):
            return float("nan"), "a cache was written outside its slots"
    caches = {id(c) for c in fresh.caches}
    given = [(x, y) for x, y in zip(fresh.args, kept.args, strict=True) if id(x) not in caches]
    if not in_place and any(not torch.equal(x, y) for x, y in given):
        return float("nan"), "an argument was changed"
    if [x.shape for x in got] != [x.shape for x in wanted]:
        return float("nan"), f"shapes {[tuple(x.shape) for x in got]}"
    errors = [_relative(x, y) for x, y in zip(got, wanted, strict=True)]
    if any(map(math.isnan, errors)):
        return float("nan"), "NaN: not all was written"
    return max(errors), None


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def _stored(cache: Tensor, inputs: Inputs) -> Tensor:
    rows = cache.index_select(inputs.axis, _slots(inputs))
    return rows.view(FP8).double() if rows.dtype == torch.uint8 else rows


def _others(cache: Tensor, inputs: Inputs) -> Tensor:
    """The rows of a cache that are not to be written."""
    rest = torch.ones(cache.shape[inputs.axis], dtype=torch.bool, device=cache.device)
    rest[_slots(inputs)] = False
    return cache.index_select(inputs.axis, rest.nonzero()[:, 0])


def _slots(inputs: Inputs) -> Tensor:
    assert inputs.slots is not None
    return inputs.slots


def _poison(like: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """NaN in the blocks that an allocator hands out next for such outputs."""
    blocks = [torch.full(x.shape, torch.nan, dtype=dtype, device=x.device) for x in like]
    del blocks


def _with(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """A copy of the inputs, each tensor changed; a copy keeps strides."""
    changed = {id(x): change(x.clone()) for x in inputs.args}
    slots = None if inputs.slots is None else changed[id(inputs.slots)]
    caches = tuple(changed[id(c)] for c in inputs.caches)
    args = tuple(changed[id(x)] for x in inputs.args)
    return dataclasses.replace(inputs, args=args, caches=caches, slots=slots)
