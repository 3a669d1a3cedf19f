"""As many slots as rows, by two sizes that Dynamo holds apart, which a write checks as it runs.

In: rows, positions and slots whose numbers are each marked dynamic. Out: one compile for all of
them, the store in the fused op, and eager's error where there are more slots than rows; where the
sizes may be unlike, a refusal that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.test_flat import ROPE, Rotated, draw, each, put
from tests.toys import D, G, assert_like

H, N, P = 4, 6, 4
Write = Callable[[Tensor, Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def index_put(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.index_put_((slots,), rows)


def index_copy(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache.index_copy_(0, slots, rows)


def pages(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, slots % P] = rows


def behind_heads(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    cache[slots // P, :, slots % P] = rows


WRITES: dict[Write, tuple[int, ...]] = {
    put: (N * P, G, D),
    index_put: (N * P, G, D),
    index_copy: (N * P, G, D),
    pages: (N, P, G, D),
    behind_heads: (N, G, P, D),
}


class Run:
    """A toy compiled once: what it gives and stores is eager's; the stages of each compile."""

    def __init__(self, write: Write, compiler: str = "eager") -> None:
        self.toy, self.shape = Rotated(each(write)), WRITES[write]
        self.fused: list[list[tuple[str, ...]]] = []
        inner = fxfuse.Backend(compiler=compiler)

        def backend(gm: Any, inputs: Any) -> Any:
            compiled = inner(gm, inputs)
            self.fused.append([f.stages for f in fxfuse.last_report().fused])
            return compiled

        self.compiled = torch.compile(self.toy, backend=backend)

    @torch.no_grad()
    def __call__(self, rows: int, slots: int, marks: str = "rows slots") -> None:
        made = [draw(rows, n, D, seed=n) for n in (H, G, G)]
        at = torch.randperm(N * P, generator=torch.Generator().manual_seed(rows))[:slots]
        for x in (*made, positions := torch.arange(rows)):
            if "rows" in marks:
                torch._dynamo.mark_dynamic(x, 0)
        if "slots" in marks:
            torch._dynamo.mark_dynamic(at, 0)
        want, got = ([torch.full(self.shape, 3.0), torch.full(self.shape, 4.0)] for _ in "ab")
        found = self.compiled(*made, positions, *got, at)
        assert_like([found, *got], [self.toy(*made, positions, *want, at), *want])


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_one_compile_stores_any_number_of_rows(write: Write, compiler: str) -> None:
    run = Run(write, compiler)
    for count in (5, 7, 2, 11):
        run(count, count)
    assert run.fused == [[(ROPE, "store(k,v)")]]


@pytest.mark.null
@pytest.mark.parametrize("write", [put, index_copy], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("rows", "slots"), [(5, 4), (5, 6), (5, 1)])
def test_other_numbers_of_slots_are_eagers_error(write: Write, rows: int, slots: int) -> None:
    run = Run(write)
    run(7, 7)
    with pytest.raises(Exception, match=r"shape mismatch|Number of indices"):
        run(rows, slots, "")


@pytest.mark.null
def test_one_row_for_several_slots_after_many_for_as_many() -> None:
    run = Run(put)
    run(7, 7)
    run(1, 5, "")
    assert run.fused == [[(ROPE, "store(k,v)")], [(ROPE,)]]


@pytest.mark.null
@pytest.mark.parametrize(("rows", "slots", "marks"), [(5, 5, "slots"), (1, 5, "slots")])
def test_sizes_that_may_be_unlike_are_told(rows: int, slots: int, marks: str) -> None:
    """No size becomes a number for it: more slots would be the model's error, not a recompile."""
    Run(put)(rows, slots, marks)
    report = fxfuse.last_report()
    assert [f.stages for f in report.fused] == [(ROPE,)]
    (refused,) = report.refused
    assert refused.stage == "store" and "which may not be equal" in refused.reason
    assert "mark" in refused.do


@pytest.mark.null
def test_a_size_that_nobody_has_seen_is_not_guarded() -> None:
    toy, slots = Rotated(each(put)), torch.tensor([7, 2, 9, 0, 4])
    torch._dynamo.decorators.mark_unbacked(slots, 0)
    made = [draw(5, n, D, seed=n) for n in (H, G, G)]
    want, got = ([torch.full(WRITES[put], 3.0), torch.full(WRITES[put], 4.0)] for _ in "ab")
    with torch.no_grad():
        run = torch.compile(toy, backend=fxfuse.Backend(compiler="eager"))
        found = run(*made, torch.arange(5), *got, slots)
        assert_like([found, *got], [toy(*made, torch.arange(5), *want, slots), *want])
    assert [f.stages for f in fxfuse.last_report().fused] == [(ROPE,)]


@pytest.mark.null
def test_no_guard_but_those_of_index_copy() -> None:
    """Which asks as it is traced."""

    def guards(write: Write) -> list[str]:
        torch._dynamo.reset()
        toy, seen = Rotated(each(write)), []
        inner = fxfuse.Backend(compiler="eager")

        def backend(gm: Any, inputs: Any) -> Any:
            compiled = inner(gm, inputs)
            env = torch._guards.TracingContext.get().fake_mode.shape_env
            seen.extend(sorted(str(g.expr) for g in env.guards))
            return compiled

        made = [draw(5, n, D, seed=n) for n in (H, G, G)]
        given = [torch.full((N * P, G, D), 3.0), torch.full((N * P, G, D), 4.0), torch.arange(5)]
        for x in (*made, positions := torch.arange(5), given[2]):
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            torch.compile(toy, backend=backend)(*made, positions, *given)
        return seen

    assert guards(put) == guards(lambda c, s, x: c.index_copy_(0, s, x))
