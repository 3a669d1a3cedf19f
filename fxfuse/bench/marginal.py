"""What a prelude costs where it stands: between the products with the weights of qkv and of o.

    marginal = graph of [qkv = x Wᵀ; prelude; q_out Oᵀ] - graph of [qkv = x Wᵀ; q Oᵀ]

Alone in a graph a kernel overlaps with its own next call; between products it does not.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxfuse.bench import timing
from fxfuse.bench.recipes import Case, Inputs

CALLS = 64


def cost(
    case: Case, device: str, run: Callable[..., Any], placed: list[list[Inputs]], rounds: int
) -> timing.Spread:
    """µs a call at T = 1, over all placements; each set of buffers has weights of its own."""
    samplers = [_sampler(case, device, run, sets) for sets in placed]
    return timing.interleaved({"": timing.in_turn(samplers)}, rounds)[""]


def _sampler(
    case: Case, device: str, run: Callable[..., Any], sets: list[Inputs]
) -> timing.Sampler:
    """Of one placement: the difference of two graphs."""
    shape, widths = case.shape, case.shape.widths()
    weights = [
        _drawn(device, sum(widths), widths[0], shape.hidden, seed) for seed in range(len(sets))
    ]

    def with_prelude(inputs: Inputs, x: Tensor, w: Tensor, o: Tensor) -> Tensor:
        packed = linear(x, w)
        parts = (packed,) if case.layout == "packed" else torch.split(packed, widths, dim=-1)
        # Of one token a part of the packed product is as contiguous as a product of its own.
        qkv = [part.reshape(-1).view(1, 1, -1) for part in parts]
        q: Tensor = run(*qkv, *inputs.args[len(qkv) :])
        return linear(q.reshape(1, -1), o)

    def without(x: Tensor, w: Tensor, o: Tensor) -> Tensor:
        return linear(linear(x, w)[:, : widths[0]], o)

    pairs = list(zip(sets, weights, strict=True))
    count = CALLS // len(sets) * len(sets)
    whole = timing.sampler(
        device, [functools.partial(with_prelude, s, *w) for s, w in pairs], count
    )
    rest = timing.sampler(device, [functools.partial(without, *w) for w in weights], count)
    return lambda: whole() - rest()


def _drawn(
    device: str, packed: int, q: int, hidden: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x [1, hidden], the weight of qkv [packed, hidden], that of o [hidden, q]."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        x = torch.randn(rows, columns, generator=generator, device=device)
        return x.mul_(columns**-0.5).bfloat16()

    return draw(1, hidden), draw(packed, hidden), draw(hidden, q)
