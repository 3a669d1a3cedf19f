"""`fxfuse tune`: which tile of the kernel is fastest for the rows of a recipe.

Each case is fused as `fxfuse bench` fuses it, the op's call is caught with its tensors, and every
tile that fits is checked against the results of the launch table's and timed beside it by direct
launches, each with results of its own, as calls of a compiled graph have them. For each run of
channels and number of tokens the tile whose times are least over the shapes, as a geometric mean,
is printed: what a rule of `lowering/tiles.py` says, which may be narrower (channels, heads).
"""

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import fxfuse.ops
from fxfuse.bench import arguments, recipes, timing
from fxfuse.bench.recipes import Case
from fxfuse.entry import Fresh
from fxfuse.lowering import launch
from fxfuse.lowering.arch import arch_of
from fxfuse.lowering.tiles import Tile
from fxfuse.patterns.record import Record
from fxfuse.progress import progress

# Those whose op is this kernel's.
RECIPES = ("prelude", "diffusion", "rope_store", "packed", "mrope")
OPS = ("fxfuse::norm_rope", "fxfuse::norm_rope_store_")
# What a call does not read or write as a whole.
UNCOUNTED = ("k_cache", "v_cache", "cos", "sin")
# Elements a thread holds: fewer leave loads narrow, more leave registers short.
LEAST, MOST = 4, 64


@dataclasses.dataclass(frozen=True)
class Caught:
    """One call of the op: its record, eps, and tensors by name, results (NaN) among them."""

    record: Record
    eps: tuple[float, float]
    tensors: dict[str, Tensor | None]

    def written(self) -> list[Tensor]:
        """What a launch writes to, as it is now."""
        names = ("q_out", "k_out", "k_cache", "v_cache")
        return [x.clone() for n in names if (x := self.tensors.get(n)) is not None]

    def again(self) -> "Caught":
        """The same call with results of its own."""
        tensors = dict(self.tensors)
        for name in ("q_out", "k_out"):
            if (x := tensors.get(name)) is not None:
                tensors[name] = torch.full_like(x, torch.nan)
        return dataclasses.replace(self, tensors=tensors)

    def heads(self) -> int:
        """The most that a stream has."""
        return max(int(x.shape[2]) for x in map(self.tensors.get, "qkv") if x is not None)


class _Catching(Fresh):
    """Runs what it compiles node by node, and keeps the op's calls."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(compiler="eager", **settings)
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def _compile(self, gm: fx.GraphModule, *_: Any) -> Any:
        calls = self.calls

        class Catcher(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if getattr(target, "_schema", None) and target._schema.name in OPS:
                    calls.append((target, args))
                return super().call_function(target, args, kwargs)

        return lambda *args: Catcher(gm).run(*args)


@torch.no_grad()
def caught(case: Case, device: str, seeds: Sequence[int]) -> list[Caught]:
    """The op's calls of a case, one of each seed's inputs."""
    backend = _Catching(gate=recipes.RECIPES[case.recipe].gate)
    torch._dynamo.reset()
    run = torch.compile(recipes.chain(case, device), backend=backend)
    for seed in seeds:
        run(*recipes.draw(case, device, seed).args)
    assert len(backend.calls) == len(seeds), f"{case.recipe} of {case.shape.name} is not one op"
    return [_call(op, args) for op, args in backend.calls]


def _call(op: Any, args: tuple[Any, ...]) -> Caught:
    given = dict(zip((a.name for a in op._schema.arguments), args, strict=True))
    record = fxfuse.ops.read_record(given["record"])
    found: dict[str, Tensor | None] = {n: x for n, x in given.items() if isinstance(x, Tensor)}
    q_out, k_out = fxfuse.ops.empty_results(given["q"], given["k"], record)
    found["q_out"] = q_out.fill_(torch.nan)
    if k_out.dim() == 4:
        found["k_out"] = k_out.fill_(torch.nan)
    return Caught(record, (given["q_eps"], given["k_eps"]), found)


def candidates(call: Caught, tokens: int) -> list[Tile]:
    """Tiles that fit rows of so many tokens."""
    channels, most = call.record.q.channels, launch.power_above(call.heads())
    found = []
    sizes = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), (1, 2, 4, 8)
    for t, h, w, ahead in itertools.product(*sizes, (False, True)):
        if LEAST <= t * h * channels // (32 * w) <= MOST and t <= tokens and h <= most:
            found.append(Tile(t, h, w, ahead))
    return found


def timed(case: Case, rounds: int, device: str = "cuda") -> tuple[int, dict[Tile | None, float]]:
    """The widest run of channels, and µs of each tile, checked against the launch table's, which
    stands under None.
    """
    from fxfuse.lowering import direct

    (one,) = caught(case, device, [0])
    moved = sum(x.nbytes for n, x in one.tensors.items() if x is not None and n not in UNCOUNTED)
    count = timing.buffer_count(device, moved, case.tokens)
    sets, target = caught(case, device, range(count)), arch_of(torch.device(device))
    many = timing.call_count(count, moved, 4e6)
    calls = [sets[i % count].again() for i in range(many)]
    want: list[Tensor] = []
    samplers = {}
    tiles = [None, *candidates(one, case.tokens)]
    for i, tile in enumerate(tiles):
        plans = [direct.planned(c.record, c.tensors, c.eps, target, tile) for c in calls]
        runs = [direct.prepared(plan) for plan in plans]
        runs[0]()
        want = want or calls[0].written()
        for x, y in zip(calls[0].written(), want, strict=True):
            # Sums in another order may round the other way: of bits that is the next number.
            least = 1e-2 if x.is_floating_point() else 1.0
            torch.testing.assert_close(x.float(), y.float(), rtol=2**-7, atol=least)
        samplers[str(i)] = timing.sampler(device, runs, many)
    spreads = timing.interleaved(samplers, rounds)
    run = launch.widest_run(one.record.q)
    return run, {tile: spreads[str(i)].median for i, tile in enumerate(tiles)}


def run(args: argparse.Namespace) -> int:
    """Time all tiles, and print the best of each class."""
    if not torch.cuda.is_available():
        raise SystemExit("fxfuse tune needs a CUDA or ROCm GPU")
    found: dict[tuple[int, int], list[dict[Tile, float]]] = {}
    told: list[dict[str, Any]] = []
    cases = [c for r in args.recipes for c in recipes.cases(r, "cuda", args.tokens, args.only)]
    with progress(len(cases)) as begin:
        for case in cases:
            begin(f"{case.recipe} {case.shape.name} T={case.tokens}")
            width, times = timed(case, args.rounds)
            now, every = times[None], {t: us for t, us in times.items() if t is not None}
            found.setdefault((width, case.tokens), []).append(every)
            print(_line(case, now, every), flush=True)
            rows = [{**dataclasses.asdict(t), "us": us} for t, us in every.items()]
            head = {"recipe": case.recipe, "shape": case.shape.name, "tokens": case.tokens}
            told.append({**head, "now_us": now, "tiles": rows})
            if args.json:
                args.json.write_text(json.dumps(told, indent=1) + "\n")
    for (width, tokens), each in sorted(found.items()):
        tile, loss = least_loss(each)
        print(
            f"run {width}, T = {tokens}: {tile}, {100 * (loss - 1):.1f} % above each shape's best"
        )
    return 0


def _line(case: Case, now: float, every: dict[Tile, float]) -> str:
    best = sorted(every, key=every.__getitem__)[:5]
    cells = "  ".join(f"{t} {every[t]:.2f}" for t in best)
    return f"{case.recipe} {case.shape.name} T={case.tokens}: now {now:.2f}  {cells}"


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
    tune.add_argument("--recipes", nargs="+", choices=RECIPES, default=["prelude"])
    tune.add_argument("--tokens", type=arguments.positive, nargs="+", metavar="T")
    tune.add_argument("--only", default="", metavar="NAME", help="a part of a shape's name")
    tune.add_argument("--rounds", type=arguments.positive, default=10)
    tune.add_argument("--json", type=Path, metavar="FILE")
    tune.set_defaults(run=run)
