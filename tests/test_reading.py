"""Reading: every Value, evaluated from its leaves in float64, is the node's real result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from fxfuse.lens import look
from fxfuse.passes import kind_of, placeholder_kinds
from fxfuse.patterns.evaluate import evaluate
from fxfuse.patterns.read import Reading, read
from fxfuse.patterns.value import MAX_EXPLICIT, MAX_FACTORS, MAX_TERMS, Leaf
from fxfuse.slots import Slot
from tests.models.families import FAMILIES
from tests.models.tiny import model_of, static_cache, token_ids
from tests.spellings import NORMS, ROPES, gemma, rsqrt
from tests.toys import Attention, Layer, by_index_copy, caches, hidden_states

pytestmark = pytest.mark.null

# Leaves are float32 results taken as float64: a node's own rounding is all that may differ.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class _Recording(fx.Interpreter):
    """Runs Dynamo's graph and keeps every tensor as it was when its node returned it."""

    def __init__(self, gm: fx.GraphModule, reading: Reading) -> None:
        super().__init__(gm)
        self.reading = reading
        self.tensors: dict[Slot, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            slots = tree_flatten(self.reading.view.results[n])[0]
            for slot, t in zip(slots, tree_flatten(result)[0], strict=False):
                if isinstance(slot, Slot) and isinstance(t, Tensor):
                    self.tensors.setdefault(slot, t.detach().clone())
        return result


def _exact(t: Tensor) -> Tensor:
    return t.to(torch.complex128) if t.is_complex() else t.double()


def _known(reading: Reading, tensors: dict[Slot, Tensor], value: Any) -> dict[Leaf, Tensor] | None:
    """Tensors for the leaves of a value; None where one is no node's result."""
    found: dict[Leaf, Tensor] = {}
    waiting, seen = list(value.leaves()), set()
    while waiting:
        leaf = waiting.pop()
        if leaf in seen:
            continue
        seen.add(leaf)
        slot = leaf.slot
        if isinstance(slot, Slot) and slot in tensors and leaf in reading.values[slot].leaves():
            t = _exact(tensors[slot])
            found[leaf] = torch.view_as_real(t)[..., int(leaf.part == "im")] if leaf.part else t
        elif leaf.definition is not None:
            waiting += [x for operand in leaf.definition.operands for x in operand.leaves()]
        else:
            return None
    return found


def wrong_values(gm: fx.GraphModule, inputs: Any) -> tuple[int, list[str]]:
    """How many values that are not their own leaf were evaluated, and which of them are wrong."""
    reading = read(look(gm), placeholder_kinds(gm, kind_of))
    runner = _Recording(gm, reading)
    runner.run(*[x.clone() if isinstance(x, Tensor) else x for x in inputs])
    checked, wrong = 0, []
    for slot, want in runner.tensors.items():
        value = reading.values[slot]
        own = len(value.terms) == 1 and [x.slot for x in value.leaves()] == [slot]
        if own or not value.terms or want.dtype == torch.bool or not want.numel():
            continue
        known = _known(reading, runner.tensors, value)
        if not known:
            continue
        got, want = evaluate(value, known), _exact(want)
        # Memory that nobody wrote yet may hold NaN; a view of it holds the same.
        same = (got == want) | (got.isnan() & want.isnan())
        off, size = (got - want)[~same].norm(), want[want.isfinite()].norm()
        error = float(off / size.clamp_min(1e-30))
        checked += 1
        if not error <= TOLERANCE:
            wrong.append(f"{slot.node}: {error:.1e}")
    return checked, wrong


@torch.no_grad()
def check(run: Any, *args: Any, **kwargs: Any) -> int:
    """Every value of every graph of one call is right; how many there were."""
    checked = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        def compare(*live: Any) -> Any:
            count, wrong = wrong_values(gm, live)
            assert wrong == []
            checked.append(count)
            return gm(*live)

        return compare

    torch.compile(run, backend=backend)(*args, **kwargs)
    return sum(checked)


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_values_of_each_rotation(rope: Any) -> None:
    assert check(Attention(rope, rsqrt), hidden_states()) > 12


@pytest.mark.parametrize("norm", [*NORMS, gemma], ids=lambda n: n.__name__)
@pytest.mark.parametrize("after", [False, True])
def test_values_of_each_norm(norm: Any, after: bool) -> None:
    assert check(Attention(norm=norm, after=after), hidden_states()) > 12


def test_values_around_a_store() -> None:
    assert check(Layer(by_index_copy), hidden_states(5), *caches()) > 12


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "gpt_neox", "llama4", "deepseek_v3", "hunyuan"]
)
def test_values_of_a_real_model_as_it_decodes(name: str) -> None:
    assert name in FAMILIES
    model = model_of(name)
    with torch.no_grad():
        kv = static_cache(model)
        model(token_ids(3), past_key_values=kv, use_cache=True)
    assert check(model, token_ids(1), past_key_values=kv, use_cache=True) > 50


# --- chains of views ---------------------------------------------------------------------------

STEPS = ["view", "permute", "slice", "step", "cat", "stack", "flip", "roll", "split"]
STEPS += ["expand", "repeat", "repeat_interleave", "select", "neg", "unbind", "mul", "add"]


@st.composite
def chains(draw: Any) -> list[tuple[str, float, float]]:
    number = st.floats(0, 0.999)
    return draw(st.lists(st.tuples(st.sampled_from(STEPS), number, number), min_size=1, max_size=6))


def step(x: Tensor, name: str, a: float, b: float) -> Tensor:
    """One op on x; a and b choose its dim and its place."""
    dim = int(a * x.dim())
    size = x.shape[dim]
    place = int(b * size)
    other = int(b * x.dim())
    if name == "view":
        return x.flatten(min(dim, other), max(dim, other))
    if name == "permute":
        return x.transpose(dim, other)
    if name == "slice":
        return x.narrow(dim, place, size - place)
    if name == "step":
        return x.movedim(dim, -1)[..., place::2]
    if name == "cat":
        return torch.cat([x, -x], dim) if size < 9 else x
    if name == "stack":
        return torch.stack([x, x * 2], other) if x.dim() < 5 else x
    if name == "flip":
        return x.flip(dim)
    if name == "roll":
        return x.roll(place, dim)
    if name == "split":
        first, *rest = x.split(place + 1, dim)
        return rest[-1] if rest else first
    if name == "expand":
        return x.unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:]) if x.dim() < 5 else x
    if name == "repeat":
        return x.repeat(*[2 if i == dim else 1 for i in range(x.dim())]) if size < 9 else x
    if name == "repeat_interleave":
        return x.repeat_interleave(2, dim=dim) if size < 9 else x
    if name == "select":
        return x.select(dim, place) if x.dim() > 2 else x
    if name == "unbind":
        return x.unbind(dim)[place] if x.dim() > 2 else x
    if name == "mul":
        return x * x.narrow(dim, place, 1)
    return -x if name == "neg" else x + x.narrow(dim, place, 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(chains(), st.tuples(*[st.integers(1, 4)] * 3))
def test_any_chain_of_views_is_read_right(
    chain: list[tuple[str, float, float]], sizes: tuple[int, int, int]
) -> None:
    torch._dynamo.reset()

    def run(x: Tensor) -> Tensor:
        for name, a, b in chain:
            x = step(x, name, a, b)
        return x + 0

    shape = (*sizes, 4)
    check(run, torch.randn(shape, generator=torch.Generator().manual_seed(0)))


# --- what is not read --------------------------------------------------------------------------

UNKNOWN = {
    "cumsum": lambda x: x.cumsum(-1),
    "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x.topk(2, -1)[0],
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "where": lambda x: torch.where(x > 0, x, -x),
    "softmax": lambda x: x.softmax(-1),
    "gather": lambda x: x.gather(-1, torch.zeros(2, 5, 3, dtype=torch.int64)),
    "int cast": lambda x: x.to(torch.int32),
    "cube": lambda x: x.pow(3),
    "in place": lambda x: x.clone().add_(1).mul_(2),
    "empty slice": lambda x: x[..., :0].sum() + x,
    "unfold": lambda x: x.unfold(-1, 4, 2),
    "as_strided": lambda x: x.as_strided((2, 3), (1, 2)),
}


@torch.no_grad()
def reading_of(run: Any, x: Tensor) -> Reading:
    seen: list[Reading] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(read(look(gm), placeholder_kinds(gm, kind_of)))
        return gm

    torch.compile(run, backend=backend)(x)
    return seen[0]


@pytest.mark.parametrize("run", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_unknown_op_gives_a_leaf(run: Any) -> None:
    x = hidden_states()
    check(lambda y: run(y) * 1, x)
    reading = reading_of(lambda y: run(y) * 1, x)
    assert any(x.slot is not None and x.slot.call is not None for x in reading.leaves)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: sum(x.roll(i, -1) * x.roll(2 * i, -1) for i in range(16)),
        lambda x: x * x * x * x * x * x * x * x * x * x,
        lambda x: (
            (x.unsqueeze(-1) * x.flip(-1).unsqueeze(-2)).repeat(1, 1, 5, 1).flatten(1).flip(-1)
        ),
    ],
    ids=["terms", "factors", "elements"],
)
def test_a_limit_ends_in_a_leaf(run: Any) -> None:
    x = hidden_states(width=64)
    check(run, x)
    for value in reading_of(run, x).values.values():
        assert len(value.terms) <= MAX_TERMS
        assert all(len(t.factors) <= MAX_FACTORS for t in value.terms)
        assert all(len(t.coefficients) <= MAX_EXPLICIT for t in value.terms)
