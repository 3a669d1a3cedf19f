"""The functions of fxfuse.ops inside graphs: opcheck, torch.compile, and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fxfuse
from fxfuse import ops
from tests.test_by_hand import PAGES, D, G, H, P, T, canaries, draw, normed, packed, turned

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """The fxfuse ops called under it, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fxfuse":
            self.seen.append((func, args))
        return func(*args, **kwargs or {})


def by_name(name: str, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor,
            k_cache: Tensor, v_cache: Tensor) -> Any:  # fmt: skip
    """One call of a function by hand on operands of any number of tokens."""
    if name == "store":
        at = (slots, k_cache, v_cache)
        return ops.qk_norm_rope_store_(q, k, v, cos, sin, *at, layout="01hd", negative="skip")
    if name == "rope":
        return ops.rope(q, k, cos, sin)
    if name == "positions":
        return ops.qk_norm_rope(q, k, cos, sin, positions=slots.clamp(0, 1), eps=1e-5)
    if name == "norm":
        return ops.qk_norm(q, k, q_weight=cos[0].repeat(2))
    if name == "add":
        return ops.add_rms_norm(q.flatten(1), q.flatten(1) * 2, weight=cos[0].repeat(2 * H))
    return ops.qk_norm_rope(q, k, cos, sin, q_weight=cos[0].repeat(2), weight_offset=1.0)


NAMES = ["qk_norm_rope", "store", "rope", "positions", "norm", "add"]


def operands(tokens: int) -> tuple[Tensor, ...]:
    angle = draw(tokens, D // 2, dtype=torch.float32)
    slots = torch.randperm(12, generator=torch.Generator().manual_seed(tokens))[:tokens] - 1
    caches = canaries((PAGES, P, G, D), (PAGES, P, G, D), dtype=torch.float32)
    return *packed(tokens, torch.float32), angle.cos(), angle.sin(), slots, *caches


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    given = operands(T)
    with Calls() as calls:
        by_name(name, *given)
    (decomposed,) = calls.seen
    torch.library.opcheck(*decomposed)


CPU = pytest.mark.cpu
COMPILED = [
    *(
        pytest.param(name, b, d)
        for name in NAMES
        for b in ("eager", "aot_eager")
        for d in (True, False)
    ),
    pytest.param("store", "inductor", True, marks=CPU),
    *(pytest.param(n, fxfuse.backend, True, marks=CPU, id=f"{n}-fxfuse") for n in ("store", "add")),
]


@pytest.mark.parametrize(("name", "backend", "dynamic"), COMPILED)
def test_compiled_whole_for_any_number_of_tokens(name: str, backend: Any, dynamic: bool) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(by_name, backend=counter, fullgraph=True, dynamic=dynamic or None)
    counts = []
    for tokens in (5, 7, 9, 2):
        given, others = operands(tokens), operands(tokens)
        want = by_name(name, *given)
        # Inductor's loops sum in another order.
        torch.testing.assert_close(compiled(name, *others), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(others[-2:], given[-2:], rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    # Unasked, torch takes the first number of tokens for the only one.
    assert len(set(counts if dynamic else counts[1:])) == 1


def test_gradients_through_a_call_by_hand() -> None:
    q, k, _ = (x.clone().requires_grad_() for x in packed())
    w, angle = draw(D).requires_grad_(), draw(T, D // 2)
    got = ops.qk_norm_rope(q, k, angle.cos(), angle.sin(), q_weight=w)
    want = turned(normed(q, w), angle, False), turned(normed(k), angle, False)
    grads = [torch.autograd.grad(sum((x**2 * 3).sum() for x in y), (q, k, w)) for y in (got, want)]
    torch.testing.assert_close(*grads)
