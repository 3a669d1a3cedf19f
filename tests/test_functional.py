"""Writes to tensors the graph made itself, rewritten as pure calls: every reader sees what it saw.

In: functions that write. Out: the same results and strides from the rewritten graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxfuse.functional import without_own_writes
from fxfuse.lens import look
from tests.spellings import Rope, halves, pairs
from tests.toys import Attention, compiled_like_eager, hidden_states

pytestmark = pytest.mark.null


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def rewritten(function: Callable[..., Any], *args: Tensor) -> tuple[fx.GraphModule | None, Any]:
    """The graph without its writes (None: it has none that can be rewritten), and its result."""
    made: list[fx.GraphModule | None] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        made.append(without_own_writes(gm, look(gm)))
        return (made[0] or gm).forward

    with torch.no_grad():
        result = torch.compile(function, backend=backend)(*args)
    return made[0], result


def by_halves_of_an_empty(x: Tensor) -> Any:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 1::2]
    out[..., 1::2] = -x[..., 0::2]
    return out


def through_views(x: Tensor) -> Any:
    y = x * 1
    first, rest = y[..., :4], y[..., 4:]
    first.addcmul_(rest, rest)
    rest.mul_(2)
    return y, first, rest, y.view(-1)


def read_in_between(x: Tensor) -> Any:
    y = x * 1
    part, other = y[..., :4], y[..., 2:6]
    before = y + 0
    part.mul_(2)
    seen = other + 1
    y[..., 3] = 5.0
    again = other.clone()
    y.add_(x)
    y.copy_(y.flip(-1))
    part[0] = 7
    return before, seen, again, part, other, y


def to_another_dtype(x: Tensor) -> Any:
    y = torch.zeros(x.shape, dtype=torch.float64)
    y[:, 1:] = x[:, 1:]
    return y


@pytest.mark.parametrize(
    "function",
    [by_halves_of_an_empty, through_views, read_in_between, to_another_dtype],
    ids=lambda f: f.__name__,
)
def test_every_reader_sees_what_it_saw(function: Any) -> None:
    x = torch.randn(2, 3, 8)
    want = function(x.clone())
    gm, got = rewritten(function, x)
    assert gm is not None
    methods = [str(n.target) for n in gm.graph.nodes if n.op == "call_method"]
    functions = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert operator.setitem not in functions and not any(m.endswith("_") for m in methods)
    want, got = (r if isinstance(r, tuple) else (r,) for r in (want, got))
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def of_an_input(x: Tensor) -> Any:
    x[..., 0] = 1
    return x


def of_a_view_of_an_input(x: Tensor) -> Any:
    x.transpose(0, 1)[0].mul_(2)
    return x


def of_two_regions_at_once(x: Tensor) -> Any:
    y = x * 1
    y[1:, ..., 1:] = 3
    return y


def at_chosen_places(x: Tensor) -> Any:
    y = x * 1
    y[x > 0] = 3
    return y


def through_a_view_of_a_part(x: Tensor) -> Any:
    a, b = (x * 1).chunk(2, -1)
    a.transpose(0, 1)[:, 0].mul_(-2)
    return a, b


@pytest.mark.parametrize(
    "function",
    [
        of_an_input,
        of_a_view_of_an_input,
        of_two_regions_at_once,
        at_chosen_places,
        through_a_view_of_a_part,
    ],
    ids=lambda f: f.__name__,
)
def test_other_writes_stay(function: Any) -> None:
    x = torch.randn(2, 3, 8)
    want = function(x.clone())
    gm, got = rewritten(function, x.clone())
    assert gm is None
    want, got = (r if isinstance(r, tuple) else (r,) for r in (want, got))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def wan(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Even and odd channels written into fresh memory."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * c - odd * s
    out[..., 1::2] = even * s + odd * c
    return out.type_as(x)


def ltx(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Both halves turned in place."""
    half = x.shape[-1] // 2
    parts = x.unflatten(-1, (2, half))
    c, s = cos[..., :half].unsqueeze(-2), sin[..., :half].unsqueeze(-2)
    out = parts * c
    out[..., :1, :].addcmul_(-s, parts[..., 1:, :])
    out[..., 1:, :].addcmul_(s, parts[..., :1, :])
    return out.flatten(-2)


@pytest.mark.parametrize(("turn", "table"), [(wan, pairs), (ltx, halves)], ids=["wan", "ltx"])
def test_a_rotation_that_writes_is_fused(turn: Any, table: Any) -> None:
    (fused,) = compiled_like_eager(Attention(Rope(turn, table)), hidden_states()).fused
    assert fused.record.k is not None and fused.record.q.rotation is not None
