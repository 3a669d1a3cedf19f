"""What fxfuse adds to Inductor's compile time, for a model of its real size.

    python benchmarks/compile_overhead.py [--model Qwen3-0.6B] [--layers 28] [--device cpu]
    python benchmarks/compile_overhead.py --depths 2 4 28 80

One token with a static cache, random bfloat16 weights, empty caches. The first compile of the
process is fxfuse's, with its imports and its proofs; Inductor alone is that of the same graph as it
came. Prints the stages in milliseconds and the ratio; the exit status says whether it is below 2 %.
With --depths nothing is compiled: what fxfuse's passes take, best of three, and for each further
layer of a kind already seen.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from transformers import StaticCache

import fxfuse
from fxfuse.bench.models import MODELS, made
from fxfuse.entry import what_compiles
from fxfuse.torch_private import empty_caches

TARGET = 0.02


def compiled(asked: argparse.Namespace, model: Any, **settings: Any) -> dict[str, float]:
    """Milliseconds by stage of one compile with nothing cached, and how many sites are fused."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=asked.device)
    cache = StaticCache(config=model.config, max_cache_len=256)
    torch.compiler.reset()
    with torch.no_grad(), empty_caches():
        model(ids, past_key_values=cache)
        report = fxfuse.explain(model, ids, past_key_values=cache, **settings)
    return {"sites": len(report.fused)} | report.milliseconds


def overhead(asked: argparse.Namespace) -> int:
    """Print fxfuse's share; 1 where it is above the target."""
    # Inductor's own imports are nobody's compile time.
    torch.compile(torch.sin)(torch.ones(4, device=asked.device))
    start = time.perf_counter()
    what_compiles()
    imports = 1e3 * (time.perf_counter() - start)
    model = made(MODELS[asked.model], asked.device, asked.layers)
    fused = compiled(asked, model)
    with fxfuse.disabled():
        stock = compiled(asked, model)
    own, inductor = imports + fused["fxfuse"], stock["compile"]
    print(f"{asked.model} on {asked.device}, torch {torch.__version__}; milliseconds:")
    stages = {"imports": imports} | fused
    print(", ".join(f"{stage} {spent:.0f}" for stage, spent in stages.items()))
    both = own + fused["compile"]
    print(f"Inductor alone {inductor:.0f}, fxfuse and Inductor behind it {both:.0f}")
    print(f"fxfuse's passes are {fused['fxfuse'] / inductor:.2%} of it")
    print(f"and with its imports {own / inductor:.2%}; target < {TARGET:.0%}")
    return int(own >= TARGET * inductor)


def growth(asked: argparse.Namespace) -> int:
    """Print what the passes take at each depth."""
    before = None
    for layers in asked.depths:
        model = made(MODELS[asked.model], asked.device, layers)
        best = min(compiled(asked, model, compiler="eager")["fxfuse"] for _ in range(3))
        each = f", {(best - before[1]) / (layers - before[0]):.0f} a layer" if before else ""
        print(f"{layers:3d} layers: {best:.0f} ms{each}", flush=True)
        before = layers, best
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen3-0.6B", choices=MODELS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--depths", type=int, nargs="+", metavar="LAYERS")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    return growth(asked) if asked.depths else overhead(asked)


if __name__ == "__main__":
    sys.exit(main())
