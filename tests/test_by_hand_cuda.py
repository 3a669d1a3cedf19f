"""Calls by hand on a GPU: eager code gets the kernel, CUDA graphs hold it, errors precede it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxfuse import ops
from fxfuse.lowering import eager, providers
from tests.test_by_hand_compiled import NAMES, by_name, operands

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]
# float32 inside, sums in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that eager code launched a kernel for."""
    names: list[str] = []

    def launched(name: str, *rest: Any) -> Any:
        results = run(name, *rest)
        names.extend([name] if results is not None else [])
        return results

    run = eager.launched
    monkeypatch.setattr(eager, "launched", launched)
    return names


def on_gpu(tokens: int) -> list[torch.Tensor]:
    return [x.cuda() for x in operands(tokens)]


@pytest.mark.parametrize("name", NAMES)
def test_eager_code_gets_the_kernel(name: str, taken: list[str]) -> None:
    for tokens in (0, 1, 5, 9):
        given, others = operands(max(tokens, 1)), on_gpu(max(tokens, 1))
        if tokens == 0:
            given, others = ([*(x[:0] for x in y[:6]), *y[6:]] for y in (given, others))
            if name in ("norm", "add", "qk_norm_rope", "positions"):
                continue  # these take their weights, or table, from the rows
        want = by_name(name, *given)
        got = by_name(name, *others)
        # Nothing is stored of no token, and no kernel asked.
        expected = 0 if tokens == 0 and "store" in name else 1
        assert len(taken) == expected, providers.PROVIDERS
        taken.clear()
        torch.testing.assert_close([x.cpu() for x in got], list(want), **CLOSE)
        torch.testing.assert_close([x.cpu() for x in others[-2:]], list(given[-2:]), **CLOSE)


@pytest.mark.parametrize("name", ["store", "add"])
def test_a_cuda_graph_holds_it(name: str) -> None:
    given = on_gpu(5)
    by_name(name, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = by_name(name, *given)
    given[0].mul_(2.0)
    want = by_name(name, *given)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, held, want))


def test_other_numbers_of_tokens_compile_nothing_anew() -> None:
    from fxfuse.lowering import kernels

    def call(tokens: int) -> None:
        q = torch.randn(2, tokens, 4, 64, device="cuda")
        ops.qk_norm(q, q)

    for tokens in (16, 32, 33, 35):
        call(tokens)
    cache = kernels.norm_rope_store.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    for tokens in (37, 39, 48, 64, 65):
        call(tokens)
    assert len(cache) == before


def test_an_error_precedes_the_launch(taken: list[str]) -> None:
    given = on_gpu(5)
    given[5] = given[5].cpu()
    with pytest.raises(ValueError, match="slots: got cpu, wanted q's device cuda:0"):
        by_name("store", *given)
    assert not taken and (given[6] == 77.0).all()
