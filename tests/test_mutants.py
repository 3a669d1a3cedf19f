"""Mutants: thousands of near misses stay right, and what keeps its meaning is fused.

A mutant is Dynamo's graph of a toy with one to three edits; `tests/mutants/` has the edits, the
toys and the comparison. A mutant that fails prints its case and its steps: `harness.again(case,
steps)` makes it again.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import fx

from fxfuse import passes, reference, reference_store
from fxfuse.patterns import frontier, prove
from tests.mutants import harness
from tests.mutants.cases import CASES, Case, captured
from tests.mutants.harness import Tally, Verdict
from tests.mutants.table import MUTATIONS, Mutation, places
from tests.toys import by_index_copy

pytestmark = pytest.mark.null

FUSED_PER_CENT = 95.0
ATTEMPTS = 8  # mutations tried for one step until one fits


def verdict_of(random: Random) -> Verdict:
    """A mutant of one to three steps, tried; half of them of meaning-keeping steps alone."""
    case, all_keep, count = random.choice(CASES), random.random() < 0.5, random.choice((1, 1, 2, 3))
    first = True

    def choose(graph: fx.Graph) -> Iterator[tuple[Mutation, fx.Node]]:
        nonlocal first
        found = places(graph, all_keep or (not first and random.random() < 0.5))
        first = False
        for _ in range(ATTEMPTS):
            name = random.choice(sorted(found))
            yield MUTATIONS[name], random.choice(found[name])

    return harness.judge(case, *harness.mutant(case, choose, count))


def tallied(examples: int) -> Tally:
    """The verdicts on that many mutants, the same ones in every run."""
    tally = Tally()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def collect(random: Random) -> None:
        tally.add(verdict_of(random))

    collect()
    return tally


def described(tally: Tally, failed: list[Verdict]) -> str:
    """The tally, and every failure in as few steps as show it."""
    return "\n".join([str(tally), *(str(harness.smallest(v)) for v in failed)])


@pytest.mark.parametrize(
    "count", [200, pytest.param(5000, marks=pytest.mark.long)], ids="{} mutants".format
)
def test_mutants_are_right_and_those_that_keep_the_meaning_fuse(
    count: int, record_property: Any
) -> None:
    assert [str(c) for c in CASES if not captured(c).stages] == [], "cases that do not fuse"
    tally = tallied(count + count // 20)
    record_property("mutants", str(tally))
    warnings.warn(str(tally), stacklevel=1)  # what pytest's summary shows, also of its workers
    assert len(tally.verdicts) >= count
    failed = tally.of("wrong", "crash", "disproved")
    assert not failed, described(tally, failed)
    assert tally.share >= FUSED_PER_CENT, described(tally, tally.unfused)
    # What chance left out of so many is looked for.
    for name in set(MUTATIONS) - tally.kinds() if count >= 5000 else ():
        verdict = behind_its_kin(MUTATIONS[name])
        assert verdict is not None, f"{name} finds no place"
        assert verdict.outcome == "right", str(verdict)


def behind_its_kin(mutation: Mutation) -> Verdict | None:
    """The verdict on a mutant with that mutation behind another one of the same ops; None where it
    fits nowhere.
    """
    kin = [m for m in MUTATIONS.values() if m.keeps and set(m.ops) & set(mutation.ops)]
    for case in CASES:
        for first in kin:
            waiting = [first, mutation]

            def choose(graph: fx.Graph) -> Iterator[tuple[Mutation, fx.Node]]:
                one = waiting.pop(0)  # noqa: B023  used up in this turn of the loop
                found = places(graph, one.keeps).get(one.name, [])
                yield from ((one, node) for node in found)

            graph, steps = harness.mutant(case, choose, 2)
            if steps and steps[-1].mutation == mutation.name:
                return harness.judge(case, graph, steps)
    return None


def test_a_mutation_that_needs_another_one_is_found() -> None:
    verdict = behind_its_kin(MUTATIONS["product_of_a_product_from_the_left"])
    assert verdict is not None and verdict.outcome == "right"


# Mutants that once went wrong or cost the whole graph: a case, a mutation and its node.
FOUND = {
    "a result written through another tensor before its reader": (
        "llama4-unit_circle, no norm after, by_setitem, slices, empty, tokens first, "
        "B=1 T=5 H=4 G=4 D=16 R=16, float32",
        ("moved_in_place_behind_its_last_reader", "view_as_real_1"),
    ),
    "a view that nobody reads any more": (
        "gpt_oss_addcmul-narrow, times_itself after, tokens_first, one view, empty, heads first, "
        "B=1 T=4 H=4 G=2 D=12 R=8, float32",
        ("moved_in_place_behind_its_last_reader", "k_2"),
    ),
    "a result that nobody reads": (
        "chunked-halves, power before, by_index_copy, slices, outside, heads first, "
        "B=2 T=5 H=4 G=2 D=12 R=8, float64",
        ("channels_rolled_by_one", "q_1"),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_right(name: str) -> None:
    text, step = FOUND[name]
    case = next(c for c in CASES if str(c) == text)
    verdict = harness.again(case, [step])
    assert verdict.steps and verdict.outcome == "right", str(verdict)


# --- the harness itself ------------------------------------------------------------------------


@pytest.fixture
def stored() -> Case:
    """A case with norm, rotation and store in one site."""
    return next(c for c in CASES if c.finish is by_index_copy and c.norm and not c.after)


def copied(case: Case) -> Verdict:
    """The verdict on the case with a copy of its first tensor in it."""
    nodes = places(captured(case).gm.graph, keeps=True)["copied"]
    return harness.again(case, [("copied", nodes[0].name)])


def test_a_harmless_mutant_is_right_and_fused(stored: Case) -> None:
    verdict = copied(stored)
    assert (verdict.outcome, verdict.keeps, verdict.fused) == ("right", True, True)
    assert verdict.whole and "copied at linear" in str(verdict)


def test_a_near_miss_does_not_keep_the_meaning(stored: Case) -> None:
    (node, *_) = places(captured(stored).gm.graph, keeps=False)["mean_turned_sum"]
    verdict = harness.again(stored, [("mean_turned_sum", node.name)])
    assert (verdict.outcome, verdict.keeps) == ("right", False)


def test_a_claim_to_keep_the_meaning_is_checked(stored: Case, monkeypatch: Any) -> None:
    claimed = dataclasses.replace(MUTATIONS["copied"], function=lambda x: x * 1.01)
    monkeypatch.setitem(MUTATIONS, "copied", claimed)
    assert not copied(stored).keeps


def test_a_wrong_sign_is_seen(stored: Case, monkeypatch: Any) -> None:
    monkeypatch.setattr(reference, "plus", lambda a, b, sign: a - sign * b)
    monkeypatch.setattr(frontier, "prove", lambda decoded: None)
    assert copied(stored).outcome == "wrong"


def test_a_wrong_slot_is_seen(stored: Case, monkeypatch: Any) -> None:
    index_of = reference_store.index_of
    monkeypatch.setattr(reference_store, "index_of", lambda *given: index_of(*given) + 1)
    assert copied(stored).outcome == "wrong"


def test_a_proof_that_fails_is_seen(stored: Case, monkeypatch: Any) -> None:
    monkeypatch.setattr(reference, "plus", lambda a, b, sign: a - sign * b)
    monkeypatch.setattr(prove, "_proved", set())
    assert copied(stored).outcome == "disproved"


def test_a_crash_is_seen(stored: Case, monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no rewrite today")

    monkeypatch.setattr(passes, "rewrite", broken)
    verdict = copied(stored)
    assert verdict.outcome == "crash" and "no rewrite today" in verdict.reason


def test_a_failure_is_told_in_as_few_steps_as_show_it(stored: Case, monkeypatch: Any) -> None:
    monkeypatch.setattr(passes, "rewrite", lambda *_: 1 / 0)
    node = places(captured(stored).gm.graph, keeps=True)["copied"][0].name
    verdict = harness.again(stored, [("contiguous", node), ("copied", node), ("plus_zero", node)])
    assert len(verdict.steps) == 3 and len(harness.smallest(verdict).steps) == 1
