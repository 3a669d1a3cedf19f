"""Residual add + RMSNorm, and QK-norm alone, on one GPU: Inductor's own kernels beside fxfuse's.

    python benchmarks/add_norm.py [--json add_norm.json]

What the gate's table says of these two kinds rests on it. Times are µs of one call in a CUDA graph
over rotating buffers, as `fxfuse bench` takes them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention

import fxfuse
from fxfuse.bench import timing
from fxfuse.bench.chains import rms_norm

TOKENS = (1, 256, 4096)
WIDTHS = (1024, 4096)
HEADS = ((16, 8, 128), (32, 8, 128))


class AddNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width).bfloat16())

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, rms_norm(total, self.weight, 1e-6)


class QkNorm(nn.Module):
    """What is timed is this module less the same one without norms."""

    def __init__(self, d: int, normed: bool = True) -> None:
        super().__init__()
        self.weight, self.normed = nn.Parameter(torch.randn(2, d).bfloat16()), normed

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.normed:
            q, k = rms_norm(q, self.weight[0], 1e-6), rms_norm(k, self.weight[1], 1e-6)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, enable_gqa=True)


def times(module: nn.Module, sets: list[tuple[Tensor, ...]], count: int) -> dict[str, float]:
    samplers = {}
    for name, how in (
        ("inductor", {}),
        ("fxfuse", {"backend": fxfuse.Backend(gate="always")}),
    ):
        torch._dynamo.reset()
        run: Any = torch.compile(module, dynamic=False, **how)
        for got, want in zip(*(flat(f(*sets[0])) for f in (run, module)), strict=True):
            torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)
        calls = [lambda args=args, run=run: run(*args) for args in sets]
        samplers[name] = timing.sampler("cuda", calls, count)
    return {name: s.median for name, s in timing.interleaved(samplers, 20).items()}


def flat(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def row(name: str, module: nn.Module, tokens: int, *sizes: tuple[int, ...]) -> dict[str, Any]:
    def drawn() -> tuple[Tensor, ...]:
        return tuple(torch.randn(s, device="cuda").bfloat16() for s in sizes)

    moved = sum(2 * 2 * torch.Size(s).numel() for s in sizes)
    count = timing.buffer_count("cuda", moved, tokens)
    found = times(module.cuda(), [drawn() for _ in range(count)], max(64 // count, 1) * count)
    print(
        f"{name} T={tokens}: " + "  ".join(f"{n} {us:.2f}" for n, us in found.items()), flush=True
    )
    return {"name": name, "tokens": tokens, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with torch.no_grad():
        for width, t in itertools.product(WIDTHS, TOKENS):
            rows.append(row(f"add + rms_norm {width}", AddNorm(width), t, *[(1, t, width)] * 2))
        for (h, g, d), t in itertools.product(HEADS, TOKENS[:2]):
            sizes = ((1, t, h, d), (1, t, g, d), (1, t, g, d))
            for normed in (True, False):
                name = f"{'qk_norm + ' if normed else ''}attention {h}/{g}/{d}"
                rows.append(row(name, QkNorm(d, normed), t, *sizes))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
