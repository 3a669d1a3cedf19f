"""Sizes that Dynamo leaves open: one compile for every length and batch, and no guard of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from tests.toys import D, G, Layer, S, assert_like, attend, by_index_copy, hidden_states

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Counting:
    """A backend that counts the graphs it compiles; fxfuse's, or torch's own for comparison."""

    def __init__(self, compiler: str, *, stock: bool = False) -> None:
        self.graphs, self.fused = 0, 0
        self.backend: Any = fxfuse.Backend(compiler=compiler)
        if stock:
            self.backend = torch._dynamo.lookup_backend(compiler)
        self.stock = stock

    def __call__(self, gm: Any, inputs: Any) -> Any:
        self.graphs += 1
        compiled = self.backend(gm, inputs)
        if not self.stock:
            report = fxfuse.last_report()
            assert report is not None and report.refused == []
            self.fused += len(report.fused)
        return compiled


def memory(batch: int, tokens: int) -> list[Tensor]:
    caches = [torch.full((batch, G, S + 8, D), 3.0) for _ in range(2)]
    return [*caches, torch.arange(1, tokens + 1)]


@torch.no_grad()
def run(backend: Any, sizes: list[tuple[int, int]], *, dynamic: bool | None) -> None:
    """The layer at (batch, tokens) after (batch, tokens), each like eager."""
    layer = Layer(by_index_copy)
    compiled = torch.compile(layer, backend=backend, dynamic=dynamic)
    for batch, tokens in sizes:
        x, want_memory, got_memory = (
            hidden_states(tokens, batch),
            memory(batch, tokens),
            memory(batch, tokens),
        )
        if dynamic is None:
            torch._dynamo.mark_dynamic(x, 1)
            torch._dynamo.mark_dynamic(got_memory[2], 0)
            if len({b for b, _ in sizes}) > 1:
                for t in (x, *got_memory[:2]):
                    torch._dynamo.mark_dynamic(t, 0)
        want = layer(x, *want_memory)
        assert_like(compiled(x, *got_memory), want)
        assert_like(got_memory, want_memory)


# The first call has sizes that differ: torch takes sizes that are equal there to be one size.
TOKENS = [7, *range(2, 18)]
LENGTHS = [(3, tokens) for tokens in TOKENS]
BOTH = [(2 + tokens % 5 // 2, tokens) for tokens in TOKENS]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["marked", "dynamic=True"])
@pytest.mark.parametrize("sizes", [LENGTHS, BOTH], ids=["tokens", "tokens and batch"])
def test_one_compile_for_all_sizes(
    compiler: str, dynamic: bool | None, sizes: list[tuple[int, int]]
) -> None:
    backend = Counting(compiler)
    run(backend, sizes, dynamic=dynamic)
    assert (backend.graphs, backend.fused) == (1, 1)


@pytest.mark.parametrize("sizes", [LENGTHS, [(1, 1), (1, 3), (2, 1), (2, 3), (3, 9)]], ids=str)
@pytest.mark.parametrize("dynamic", [False, True, None])
def test_no_more_compiles_than_stock(dynamic: bool | None, sizes: list[tuple[int, int]]) -> None:
    if dynamic is None and sizes is not LENGTHS:
        pytest.skip("a size of one is a constant to torch, and may not be marked")
    sizes = sizes[:5]
    ours, stock = Counting("eager"), Counting("eager", stock=True)
    run(stock, sizes, dynamic=dynamic)
    torch._dynamo.reset()
    run(ours, sizes, dynamic=dynamic)
    assert ours.graphs == stock.graphs


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="index_copy_ does not ask for its sizes; fxfuse does"
)
@torch.no_grad()
def test_no_guard_is_added() -> None:
    """Every size may still be anything: the guards are those of torch's own backend."""

    def guards(backend: Any) -> list[str]:
        torch._dynamo.reset()
        seen = []
        x, caches = hidden_states(5), memory(2, 5)
        for t, dim in ((x, 1), (caches[2], 0), (x, 0), (caches[0], 0), (caches[1], 0)):
            torch._dynamo.mark_dynamic(t, dim)

        def watching(gm: Any, inputs: Any) -> Any:
            compiled = backend(gm, inputs)
            env = torch._guards.TracingContext.get().fake_mode.shape_env
            seen.extend(sorted(str(g.expr) for g in env.guards))
            return compiled

        torch.compile(Layer(by_index_copy), backend=watching)(x, *caches)
        return seen

    assert guards(fxfuse.Backend(compiler="eager")) == guards(torch._dynamo.lookup_backend("eager"))


@torch.no_grad()
def test_no_tokens_at_all() -> None:
    layer, x = Layer(lambda q, k, v: attend(q, k, v).sum(2) + q.sum(2)), hidden_states(0)
    compiled = torch.compile(layer, backend=fxfuse.Backend(compiler="eager"))
    assert_like(compiled(x), layer(x))
