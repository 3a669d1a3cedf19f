"""The harness: a mutant is a case with mutations on it; its verdict, and a tally of verdicts.

In: a case and the steps that mutate it, by name, so that a mutant can be made again from its
description. Out: whether fuse_graph on the mutant's graph gives the mutant's own results, and
whether a mutant that keeps the meaning is fused as its case is.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from fxfuse.passes import fuse_graph
from fxfuse.report import Report
from fxfuse.torch_private import copy_graph, fake_mode_of, with_graph
from tests.mutants import (  # noqa: F401  they enter their mutations into the table
    changing,
    changing_channels,
    changing_memory,
    keeping,
    keeping_order,
    keeping_views,
)
from tests.mutants.cases import SETTINGS, Captured, Case, captured, difference, rotated, run
from tests.mutants.table import MUTATIONS, Mutation, NoPlace, example, mutated

Outcome = Literal["right", "wrong", "crash", "disproved", "no mutant"]

# The mutant in another order of operations: a sum's rounding, amplified by norm and softmax.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@dataclass(frozen=True)
class Step:
    """A mutation by name, and the node it was applied to, by name."""

    mutation: str
    node: str

    def __str__(self) -> str:
        return f"{self.mutation} at {self.node}"


@dataclass(frozen=True)
class Verdict:
    case: Case
    steps: tuple[Step, ...]
    outcome: Outcome
    reason: str = ""
    keeps: bool = False
    fused: bool = False
    whole: bool = False
    text: str = dataclasses.field(default="", repr=False)

    @property
    def kind(self) -> tuple[Outcome, bool, bool]:
        return self.outcome, self.keeps, self.fused

    def __str__(self) -> str:
        steps = "; ".join(map(str, self.steps))
        return f"{self.outcome}: {steps}\n    in {self.case}\n    {self.reason}"


def mutant(
    case: Case, choose: Callable[[fx.Graph], Iterator[tuple[Mutation, fx.Node]]], count: int
) -> tuple[fx.Graph, list[Step]]:
    """The case's graph with up to `count` mutations, each the first of those chosen that fits."""
    base = captured(case)
    graph, _ = copy_graph(base.gm.graph)
    steps: list[Step] = []
    for _ in range(count):
        for mutation, node in choose(graph):
            try:
                new = mutated(graph, mutation, node, fake_mode_of(base.gm))
            except NoPlace:
                continue
            steps.append(Step(mutation.name, node.name))
            graph = new
            break
    return graph, steps


def again(case: Case, steps: Sequence[tuple[str, str]]) -> Verdict:
    """The verdict on a mutant by its description: names of mutations and of nodes. A step whose
    node is missing is left out.
    """
    waiting = list(steps)

    def choose(graph: fx.Graph) -> Iterator[tuple[Mutation, fx.Node]]:
        name, place = waiting.pop(0)
        yield from ((MUTATIONS[name], n) for n in graph.nodes if n.name == place)

    return judge(case, *mutant(case, choose, len(steps)))


def smallest(verdict: Verdict) -> Verdict:
    """The same verdict on as few of the mutant's steps as give it."""
    for i in range(len(verdict.steps)):
        fewer = [(s.mutation, s.node) for j, s in enumerate(verdict.steps) if j != i]
        shorter = again(verdict.case, fewer)
        if shorter.kind == verdict.kind:
            return smallest(shorter)
    return verdict


@torch.no_grad()
def judge(case: Case, graph: fx.Graph, steps: Sequence[Step]) -> Verdict:
    """Fuse a mutant and compare; a mutant that eager itself cannot run is none."""
    base = captured(case)
    verdict = Verdict(case, tuple(steps), "no mutant", text=str(graph))
    if not steps:
        return verdict
    gm = with_graph(base.gm, graph)
    try:
        want = run(gm, base.inputs)
    except (RuntimeError, IndexError) as error:
        return dataclasses.replace(verdict, reason=f"does not run: {error}".splitlines()[0])
    tolerance = TOLERANCE[case.dtype]
    claims = all(MUTATIONS[s.mutation].keeps for s in steps)
    keeps = claims and difference(want, base.results) <= tolerance
    verdict = dataclasses.replace(verdict, keeps=keeps)
    with _errors() as errors:
        fused, report = fuse_graph(gm, SETTINGS)
    if failed := [n for n in report.notes if "an error of fxfuse" in n]:
        return dataclasses.replace(verdict, outcome="crash", reason=failed[0])
    try:
        error = difference(run(fused, base.inputs), want)
    except Exception as failure:
        reason = f"the fused graph fails: {type(failure).__name__}: {failure}".splitlines()[0]
        return dataclasses.replace(verdict, outcome="crash", reason=reason)
    verdict = dataclasses.replace(verdict, **_fused(base, report), reason=_reasons(report))
    if not error <= max(tolerance, _own_rounding(gm, base, want)):
        return dataclasses.replace(verdict, outcome="wrong", reason=f"error {error:.1e}; {report}")
    if errors:
        return dataclasses.replace(verdict, outcome="disproved", reason="; ".join(errors))
    return dataclasses.replace(verdict, outcome="right")


def _fused(base: Captured, report: Report) -> dict[str, bool]:
    stages = [f.stages for f in report.fused]
    enough = len(stages) >= len(base.stages) and rotated(report) >= base.rotated
    return {"fused": bool(stages) and enough, "whole": sorted(stages) == sorted(base.stages)}


def _reasons(report: Report) -> str:
    found = [f"{r.stage}: {r.reason} (node {r.node})" for r in report.refused]
    return "; ".join([*found, *report.notes]) or "nothing was refused"


def _own_rounding(gm: fx.GraphModule, base: Captured, want: list[Any]) -> float:
    """Twice what the mutant's casts to a narrower float and back do to its results.

    A fused op rounds once, at its end: such a cast may be left out, and nothing else may.
    """
    graph, _ = copy_graph(gm.graph)
    narrow = [n for n in graph.nodes if _dtype(n) in (torch.float16, torch.bfloat16)]
    for node in narrow:
        node.replace_all_uses_with(node.all_input_nodes[0])
    return 2 * difference(run(with_graph(gm, graph), base.inputs), want) if narrow else 0.0


def _dtype(node: fx.Node) -> torch.dtype | None:
    t = example(node)
    return t.dtype if isinstance(t, torch.Tensor) else None


@contextmanager
def _errors() -> Iterator[list[str]]:
    """What fxfuse logs as an error: a proof that failed is a bug, though nothing is fused."""
    found: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fxfuse")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


class Tally:
    """Verdicts of a run, and what is said about them at its end."""

    def __init__(self) -> None:
        self.verdicts: dict[tuple[Case, str], Verdict] = {}

    def add(self, verdict: Verdict) -> None:
        if verdict.outcome != "no mutant":
            self.verdicts.setdefault((verdict.case, verdict.text), verdict)

    def of(self, *outcomes: Outcome) -> list[Verdict]:
        return [v for v in self.verdicts.values() if v.outcome in outcomes]

    @property
    def keeping(self) -> list[Verdict]:
        return [v for v in self.verdicts.values() if v.keeps]

    @property
    def unfused(self) -> list[Verdict]:
        return [v for v in self.keeping if not v.fused]

    @property
    def share(self) -> float:
        """Per cent of the meaning-keeping mutants that are fused."""
        return 100 * (1 - len(self.unfused) / max(len(self.keeping), 1))

    def kinds(self) -> set[str]:
        """The mutations that were applied."""
        return {s.mutation for v in self.verdicts.values() for s in v.steps}

    def __str__(self) -> str:
        counts = Counter(v.outcome for v in self.verdicts.values())
        fused = sum(v.fused for v in self.verdicts.values())
        whole = 100 * sum(v.whole for v in self.keeping) / max(len(self.keeping), 1)
        return (
            f"mutants: {len(self.verdicts)} tried ({len(self.kinds())} kinds of mutation), "
            f"{fused} fused, {counts['wrong']} wrong, {counts['crash']} crashed, "
            f"{counts['disproved']} disproved; {len(self.keeping)} keep the meaning, "
            f"{self.share:.1f} % fused, {whole:.1f} % with every stage"
        )
