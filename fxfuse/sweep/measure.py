"""One unit, run eagerly and compiled with fxfuse: what was fused, what is left, what differs.

In: a unit's name and a `Plan`. Out: a UnitResult. Nothing raised by the model or by fxfuse escapes.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache

import fxfuse
from fxfuse.compiling import source_tag
from fxfuse.patterns.record import Record
from fxfuse.report import Report, stages_of
from fxfuse.sweep.build import Example, example_of, unit_named
from fxfuse.sweep.residue import Remains, remains_of
from fxfuse.sweep.results import Run, UnitResult
from fxfuse.sweep.rotations import attention_calls, rotary_counts
from fxfuse.sweep.scenarios import (
    TOLERANCE,
    USUAL,
    Scenario,
    largest_error,
    scenario_of,
    scenarios_for,
)

# Layers are compiled one by one behind a graph break; a model has more of them than Dynamo's limit.
RECOMPILES = 64


@dataclass(frozen=True)
class Plan:
    """What every unit is put through. `compiler` is eager, aot_eager or inductor."""

    scenarios: tuple[str, ...] = USUAL
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    compiler: str = "eager"


class Watching(fxfuse.Backend):
    """A backend that keeps the reports, what remains in each graph, and how often each one runs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.reports: list[Report] = []
        self.remains: list[Remains] = []
        self.runs: list[int] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Any, **options: Any) -> Any:
        compiled = super().__call__(gm, example_inputs, **options)
        report = fxfuse.last_report()
        assert report is not None
        index = len(self.reports)
        self.reports.append(report)
        self.runs.append(0)

        def counted(*args: Any) -> Any:
            self.runs[index] += 1
            return compiled(*args)

        return counted

    def _compile(self, gm: fx.GraphModule, *how: Any) -> Any:
        self.remains.append(remains_of(gm))
        return super()._compile(gm, *how)


def measure(name: str, plan: Plan) -> UnitResult:
    """Every scenario of a unit in every dtype; where none works, the one without a cache."""
    start = time.perf_counter()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    unit = unit_named(name)
    result = UnitResult(name, unit.model, sources=source_tag())
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=RECOMPILES):
        for dtype in plan.dtypes:
            try:
                example = example_of(unit, getattr(torch, dtype), plan.device)
                names, note = scenarios_for(example, plan.scenarios)
            except Exception as error:
                result.not_run = f"not built: {_short(error)}"
                break
            result.notes = [note] if note else []
            runs = [_run(example, scenario, dtype, plan) for scenario in names]
            if "no_cache" not in names and all(r.status in ("stock", "none") for r in runs):
                runs.append(_run(example, "no_cache", dtype, plan))
            result.runs += runs
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def _run(example: Example, name: str, dtype: str, plan: Plan) -> Run:
    run = Run(name, dtype)
    try:
        scenario = scenario_of(example, name)
        state = scenario.prepare()
        with attention_calls() as calls:
            output = scenario.call(example.model, state)
        run.rotary = asdict(rotary_counts(calls))
        want = scenario.tensors(output, state)
    except Exception as error:
        run.status, run.message = "none", f"eager: {_short(error)}"
        return run
    tolerance = TOLERANCE[getattr(torch, example.unit.rounds or dtype)]
    before, backend = dict(fxfuse.counts()), Watching(compiler=plan.compiler)
    codes: list[str] = []
    try:
        with _generated(codes):
            got = _compiled_outcome(scenario, example.model, backend)
        run.error, run.worst = largest_error(got, want)
        run.status = "ok" if run.error <= tolerance else "wrong"
    except Exception as error:
        run.status, run.message = "crash", _short(error)
    _note_graphs(run, backend, before)
    if plan.compiler == "inductor" and run.status != "crash":
        run.residue += _not_lowered(backend, codes)
    if run.status != "ok":
        _compare_with_stock(run, scenario, example.model, plan.compiler, want, tolerance)
    return run


def _compiled_outcome(scenario: Scenario, model: Any, backend: Any) -> dict[str, Tensor]:
    """What the scenario leaves when the model is compiled afresh; its state is prepared eagerly."""
    torch._dynamo.reset()
    counters.clear()
    state = scenario.prepare()
    output = scenario.call(torch.compile(model, backend=backend, dynamic=False), state)
    return scenario.tensors(output, state)


@contextmanager
def _generated(codes: list[str]) -> Iterator[None]:
    """Inductor's generated modules, as they are written; none comes from its cache."""
    with fresh_cache(), mock.patch.object(GraphLowering, "save_output_code", codes.append):
        yield


def _not_lowered(backend: Watching, codes: list[str]) -> list[str]:
    """Ops that the generated code does not contain, or calls as they are."""
    lines = [line for code in codes for line in code.splitlines()]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    problems = []
    if any(remains.ops for remains in backend.remains) and "norm_rope" not in text:
        problems.append("fused ops without a kernel in the generated code")
    if "torch.ops.fxfuse" in text:
        problems.append("a fused op that is called, not lowered")
    return problems


def _compare_with_stock(
    run: Run, scenario: Scenario, model: Any, compiler: str, want: Any, tolerance: float
) -> None:
    """A result that stock torch.compile gives too is not fxfuse's."""
    try:
        run.stock_error, _ = largest_error(_compiled_outcome(scenario, model, compiler), want)
        stock = "ok" if run.stock_error <= tolerance else "wrong"
    except Exception as error:
        stock = f"crash: {_short(error)}"
    if stock.startswith(run.status):
        run.status = "stock"
    run.message = f"{run.message}; stock: {stock}".removeprefix("; ")


def _note_graphs(run: Run, backend: Watching, before: dict[str, int]) -> None:
    """What the reports say, weighted by how often each graph ran, and what the graphs hold."""
    after = fxfuse.counts()
    run.compiled = {k: n for k in after if (n := after[k] - before.get(k, 0))}
    run.graphs, run.breaks = len(backend.remains), sum(counters["graph_break"].values())
    stages: Counter[str] = Counter()
    for report, remains, times in zip(backend.reports, backend.remains, backend.runs, strict=False):
        run.fused += times * sum(f.kind == "attention" for f in report.fused)
        ours = [f.record for f in report.fused if isinstance(f.record, Record)]
        stored = sum(record.store is not None for record in ours)
        run.stored += times * stored
        run.tensors += times * sum(
            stream is not None and stream.rotation is not None
            for record in ours
            for stream in (record.q if record.q.keep else None, record.k)
        )
        stages.update(" + ".join(stages_of(record)) for record in ours)
        run.notes += [n for n in report.notes if n not in run.notes]
        for refusal in report.refused:
            said = {"stage": refusal.stage, "reason": refusal.reason, "where": refusal.where}
            run.refusals += [said] if said not in run.refusals else []
        run.residue += [str(r) for r in remains.residue]
        claimed = len(ours), stored
        if claimed != (remains.ops, remains.stores):
            run.residue.append(
                f"ops, stores: {claimed} claimed, {remains.ops, remains.stores} there"
            )
    run.stages = dict(stages)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"
