"""`fxfuse tune`: which tile of the kernel is fastest, by the widest run of channels and by rows.

Every tile that fits is checked against the first one's results and timed on the shapes of the
recipes; for each run and number of tokens the tile whose times are least over the shapes, as a
geometric mean, is printed: what a rule of `lowering/tiles.py` says.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfuse.bench import timing
from fxfuse.bench.shapes import DIFFUSION, PRELUDES, ROPE_STORE, Shape
from fxfuse.lowering import launch
from fxfuse.lowering.tiles import Tile
from fxfuse.patterns.record import Layout, Norm, Pair, Pass, Record, Rotation, Store, Stream
from fxfuse.progress import progress

SHAPES = (*PRELUDES, DIFFUSION[0], ROPE_STORE[1])
TOKENS = (1, 16, 64, 256, 4096, 16384)
EPS = (1e-6, 1e-6)
# Elements a thread holds: fewer leave loads narrow, more leave registers short.
LEAST, MOST = 2, 64


def record_of(shape: Shape) -> Record:
    """What a chain of the recipes becomes; with a store where the shape has one."""
    d, r = shape.head_dim, shape.rotary
    adjacent, full = shape.rotation == "gptj", shape.rotation == "half"
    pair = Pair(0, 1, 2) if adjacent else Pair(0, r // 2, 1)
    table = Pair(0, r // 2, 1) if full else Pair(0, 0, 1)
    turn = Rotation(r // 2, pair, pair, table, table, (-1, 1))
    norm = Norm("head", "before", True, float(shape.norm == "gemma")) if shape.norm else None
    stores = shape not in DIFFUSION
    passes = (Pass(r, r, d - r),) if r < d else ()
    q = Stream(d, norm, turn, passes, dtype="bfloat16")
    v = Stream(d, None, None, (Pass(0, 0, d),), dtype="bfloat16", keep=False)
    if not stores:
        return Record(q, q)
    return Record(q, dataclasses.replace(q, keep=False), v, Store(Layout("bh0d"), Layout("bh0d")))


def operands(shape: Shape, record: Record, tokens: int) -> dict[str, Tensor | None]:
    """Random tensors of one launch; results are NaN."""

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, device="cuda").bfloat16()

    h, g, d = shape.heads, shape.kv_heads, shape.head_dim
    found: dict[str, Tensor | None] = {"q": draw(1, tokens, h, d), "k": draw(1, tokens, g, d)}
    if shape.norm:
        found |= {"q_weight": draw(d), "k_weight": draw(d)}
    found |= {name: draw(1, tokens, shape.rotary) for name in ("cos", "sin")}
    outs = {"q_out": h} | ({} if record.store else {"k_out": g})
    for name, heads in outs.items():
        sizes = (1, tokens, heads, d)
        found[name] = torch.full(sizes, torch.nan, dtype=torch.bfloat16, device="cuda")
    if record.store:
        found |= {name: draw(1, g, max(tokens, 1024), d) for name in ("k_cache", "v_cache")}
        found |= {"v": draw(1, tokens, g, d), "slots": torch.arange(tokens, device="cuda")[None]}
    return found


def candidates(shape: Shape, run: int, tokens: int) -> list[Tile]:
    """Tiles that fit a number of tokens: one token with a head a warp, or whole tables a warp."""
    most = launch.power_above(max(shape.heads, shape.kv_heads))
    found = []
    for t, h, w in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8)):
        each = t * h * shape.head_dim // (32 * w)
        matched = t * run == 256 * w or t == 1
        if matched and LEAST <= each <= MOST and t <= max(1, tokens) and h <= most:
            found.append(Tile(t, h, w))
    return found


def timed(shape: Shape, tokens: int, rounds: int) -> dict[Tile, float]:
    """µs of each tile, checked against the first one's results."""
    from fxfuse.lowering import direct

    record = record_of(shape)
    first = operands(shape, record, tokens)
    moved = sum(x.nbytes for n, x in first.items() if x is not None and "cache" not in n)
    count = timing.buffer_count("cuda", moved, tokens)
    sets = [first, *(operands(shape, record, tokens) for _ in range(count - 1))]
    tiles = candidates(shape, launch.widest_run(record.q), tokens)
    samplers, want = {}, None
    for i, tile in enumerate(tiles):
        plans = [direct.planned(record, tensors, EPS, tile=tile) for tensors in sets]
        calls = [direct.prepared(plan) for plan in plans]
        calls[0]()
        got = [first[n] for n in ("q_out", "k_out", "k_cache") if n in first]
        want = want or [x.clone() for x in got if x is not None]
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-2)
        samplers[str(i)] = timing.sampler("cuda", calls, timing.call_count(count, moved, 4e6))
    spreads = timing.interleaved(samplers, rounds)
    return {tile: spreads[str(i)].median for i, tile in enumerate(tiles)}


def run(args: argparse.Namespace) -> int:
    """Time all tiles, and print the best of each class."""
    if not torch.cuda.is_available():
        raise SystemExit("fxfuse tune needs a CUDA or ROCm GPU")
    found: dict[tuple[int, int], list[dict[Tile, float]]] = {}
    told: list[dict[str, Any]] = []
    cases = list(itertools.product(SHAPES, args.tokens))
    with progress(len(cases)) as begin:
        for shape, tokens in cases:
            begin(f"{shape.name} T={tokens}")
            times = timed(shape, tokens, args.rounds)
            found.setdefault((launch.widest_run(record_of(shape).q), tokens), []).append(times)
            best = sorted(times, key=times.__getitem__)[:5]
            cells = "  ".join(f"{dataclasses.astuple(t)} {times[t]:.2f}" for t in best)
            print(f"{shape.name} T={tokens}: {cells}", flush=True)
            rows = [{**dataclasses.asdict(t), "us": us} for t, us in times.items()]
            told.append({"shape": shape.name, "tokens": tokens, "tiles": rows})
            if args.json:
                args.json.write_text(json.dumps(told, indent=1) + "\n")
    for (width, tokens), every in sorted(found.items()):
        tile, loss = least_loss(every)
        print(
            f"run {width}, T = {tokens}: {tile}, {100 * (loss - 1):.1f} % above each shape's best"
        )
    return 0


def least_loss(every: list[dict[Tile, float]]) -> tuple[Tile, float]:
    """The tile, of those that all shapes have, that is nearest to each shape's best."""
    common = set.intersection(*(set(times) for times in every))
    losses = {
        tile: statistics.geometric_mean(times[tile] / min(times.values()) for times in every)
        for tile in common
    }
    best = min(losses, key=losses.__getitem__)
    return best, losses[best]


def add_arguments(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Enter `tune` into a parser."""
    words = "find the kernel's fastest tiles on this GPU, for lowering/tiles.py"
    tune = subcommands.add_parser("tune", help=words, description=words)
    tune.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="T")
    tune.add_argument("--rounds", type=int, default=10)
    tune.add_argument("--json", type=Path, metavar="FILE")
    tune.set_defaults(run=run)
