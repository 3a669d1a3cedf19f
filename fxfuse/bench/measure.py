"""One row: the case's chain built by each opponent, checked, then timed beside the others."""

import functools
import itertools
import time
from collections.abc import Sequence

import torch

import fxfuse
from fxfuse.bench import check, marginal, recipes, timing
from fxfuse.bench.chains import Chain
from fxfuse.bench.opponents import Opponent, Run
from fxfuse.bench.recipes import Case, Inputs
from fxfuse.bench.rows import Figure, Fusion, Row, told

# Seeds of the buffers that are timed count from 0.
CHECK_SEED = 100_003


@torch.no_grad()
def compile_only(case: Case, device: str, opponent: Opponent) -> float:
    """Seconds of a first run, which leaves what was compiled in Inductor's caches on disk."""
    torch.compiler.reset()
    start = time.perf_counter()
    run = opponent.build(case, recipes.chain(case, device))
    run(*recipes.draw(case, device, CHECK_SEED).args)
    return time.perf_counter() - start


@torch.no_grad()
def measure(
    case: Case, device: str, opponents: Sequence[Opponent], rounds: int, copy_speed: float
) -> Row:
    """A row with a figure for each opponent."""
    torch.compiler.reset()
    chain = recipes.chain(case, device)
    fresh = recipes.draw(case, device, CHECK_SEED)
    wanted = check.truth(chain, fresh)
    returned = wanted.outputs[: len(wanted.outputs) - len(fresh.caches)]
    # Results are counted in the working dtype.
    outputs = tuple(x.to(torch.bfloat16) for x in returned)
    row = Row(case.recipe, case.shape.name, case.layout, case.tokens, fresh.moved_bytes(outputs))
    row.eager_error = wanted.eager_error
    row.carried_us = case.shape.carried.get(case.tokens) if device == "cuda" else None
    runs: dict[str, Run] = {}
    for opponent in opponents:
        before = fxfuse.last_report()
        run, figure = _checked(opponent, case, chain, fresh, wanted)
        row.figures[opponent.name] = figure
        report = fxfuse.last_report()
        if opponent.name == "fxfuse" and report is not None and report is not before:
            row.fusion = fusion(case, report)
        if run is not None:
            runs[opponent.name] = run
    del wanted, returned, outputs
    if runs:
        _time(row, case, device, runs, rounds, copy_speed)
    return row


def _checked(
    opponent: Opponent, case: Case, chain: Chain, fresh: Inputs, wanted: check.Truth
) -> tuple[Run | None, Figure]:
    """The opponent's callable, or None where it fails or computes something else."""
    start = time.perf_counter()
    try:
        run = opponent.build(case, chain)
        error, wrong = check.check(run, fresh, wanted, in_place=opponent.in_place)
    except Exception as problem:
        return None, Figure(wrong=told(problem))
    figure = Figure(error, wrong, compile_s=time.perf_counter() - start)
    return (None if wrong else run), figure


def fusion(case: Case, report: fxfuse.Report) -> Fusion:
    """What a report says of the case's chain."""
    stages = [" + ".join(site.stages) for site in report.fused]
    providers = sorted({site.provider for site in report.fused})
    return Fusion(stages == [case.stages], stages, providers, [str(r) for r in report.refused])


def _time(
    row: Row, case: Case, device: str, runs: dict[str, Run], rounds: int, copy_speed: float
) -> None:
    """Fill in the times of a row."""
    row.buffers = timing.buffer_count(device, row.moved_bytes, case.tokens)
    count = timing.call_count(row.buffers, row.moved_bytes, copy_speed)
    set_bytes, seeds = row.buffers * row.moved_bytes, itertools.count()
    row.placements = timing.placement_count(device, set_bytes, case.tokens)
    placed = [
        [recipes.draw(case, device, next(seeds)) for _ in range(row.buffers)]
        for _ in range(row.placements)
    ]
    samplers = {}
    for name, run in runs.items():
        try:
            calls = [[functools.partial(run, *s.args) for s in sets] for sets in placed]
            samplers[name] = timing.in_turn([timing.sampler(device, c, count) for c in calls])
        except RuntimeError as problem:
            row.figures[name].wrong = f"not captured: {told(problem)}"
    copies = [timing.copy_sampler(device, row.moved_bytes, row.buffers, count) for _ in placed]
    samplers[""] = timing.in_turn(copies)
    times = timing.interleaved(samplers, rounds)
    row.copy_us = times.pop("").median
    for name, us in times.items():
        row.figures[name].us = us
    if device == "cuda" and case.tokens == 1 and case.recipe == "prelude" and case.shape.hidden:
        best = row.best([name for name in runs if name != "fxfuse"])
        for name in [n for n in times if n in ("fxfuse", best)]:
            row.figures[name].marginal = marginal.cost(case, device, runs[name], placed, rounds)
