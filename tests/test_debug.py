"""Debug mode: slots out of bounds, NaN, and results that differ, told with the model's line."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from fxfuse import debug_checks, reference
from tests.spellings import rsqrt
from tests.test_by_hand_compiled import Calls, by_name, operands
from tests.test_flat import Rotated
from tests.test_layouts import LAYOUTS, PAGES, SLOTS, N, P, each
from tests.test_register_store import PADDED, SAME_NAMES, padded
from tests.toys import (
    Attention,
    B,
    D,
    G,
    Layer,
    T,
    assert_like,
    by_index_copy,
    caches,
    hidden_states,
)

pytestmark = pytest.mark.null
H = 4
CPU = pytest.param("inductor", marks=pytest.mark.cpu)
COMPILERS = pytest.mark.parametrize("compiler", ["eager", "aot_eager", CPU])


@pytest.fixture(autouse=True)
def _fresh(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXFUSE_DEBUG", raising=False)
    caplog.set_level(logging.WARNING, "fxfuse")
    torch._dynamo.reset()


def checked(model: Any, compiler: str = "eager", **settings: Any) -> Any:
    return torch.compile(model, backend=fxfuse.Backend(compiler=compiler, debug=True, **settings))


def by_setitem(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks[:, :, slots] = k
    vs[:, :, slots] = v
    return q, ks.sum()


@COMPILERS
@torch.no_grad()
def test_a_sound_layer_is_as_without_and_nothing_is_told(compiler: str, caplog: Any) -> None:
    layer, (want, got) = Layer(by_index_copy), (caches(), caches())
    compiled = checked(layer, compiler)
    for _ in range(2):
        assert_like(compiled(hidden_states(T), *got), layer(hidden_states(T), *want))
    assert_like(got, want)
    assert len(fxfuse.last_report().fused) == 1 and not caplog.records


@COMPILERS
@torch.no_grad()
def test_a_slot_out_of_bounds_is_named_and_nothing_is_written(compiler: str) -> None:
    layer, memory = Layer(by_setitem), caches()
    compiled = checked(layer, compiler)
    compiled(hidden_states(T), *memory)
    before = [x.clone() for x in memory[:2]]
    memory[2][1] = 99
    size = memory[0].shape[2]
    with pytest.raises(IndexError) as error:
        compiled(hidden_states(T), *memory)
    said = str(error.value)
    assert (
        f"slots[0, 1] is 99, out of bounds: allowed are -{size} to {size - 1} (axis 0 of k_cache"
        in said
    )
    assert "tests/spellings.py:" in said and "Look at what computes slots" in said
    assert all(map(torch.equal, memory[:2], before))


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_every_layout_are_compared_and_sound(name: str, caplog: Any) -> None:
    write_k, write_v, k_shape, v_shape, *_ = LAYOUTS[name]
    rows = [torch.randn(T, n, D) for n in (H, G, G)]
    memory = [torch.full(s, 3.0) for s in (k_shape, v_shape)]
    slots = SLOTS.clone()
    slots[1] = slots[3]  # of two rows for one slot the last one stays
    compiled = checked(Rotated(each(write_k, write_v)))
    compiled(*rows, torch.arange(T), *memory, slots)
    assert fxfuse.last_report().fused[0].record.store and not caplog.records
    slots[2] = 24
    with pytest.raises(
        IndexError, match=r"slots\[0, 2\] is 24, out of bounds: allowed are -24 to 23"
    ):
        compiled(*rows, torch.arange(T), *memory, slots)


@torch.no_grad()
def test_a_slot_that_is_skipped_is_not_out_of_bounds(caplog: Any) -> None:
    rows = [torch.randn(T, n, D) for n in (H, G, G)]
    memory, pad = [torch.full(PAGES, 3.0) for _ in "kv"], N * P
    slots = torch.tensor([pad, 0, 3, pad, 5])
    with fxfuse.register_store(PADDED, **SAME_NAMES, skipped_slot=pad):
        compiled = checked(Rotated(padded(pad)))
        compiled(*rows, torch.arange(T), *memory, slots)
        assert fxfuse.last_report().fused[0].record.store.skipped == pad and not caplog.records
        slots[1] = pad + 1
        with pytest.raises(IndexError, match=rf"is {pad + 1}, out of bounds.*, {pad} is skipped"):
            compiled(*rows, torch.arange(T), *memory, slots)


@torch.no_grad()
def test_a_position_out_of_bounds() -> None:
    rows, positions = [torch.randn(T, n, D) for n in (H, G, G)], torch.arange(T)
    compiled = checked(Rotated(lambda q, k, v: (q, k)))
    compiled(*rows, positions)
    positions[3] = 64
    with pytest.raises(
        IndexError, match=r"positions\[0, 3\] is 64, out of bounds: allowed are -64 to 63"
    ):
        compiled(*rows, positions)


@torch.no_grad()
def test_nan_is_told_once_a_site(caplog: Any) -> None:
    layer = Attention(norm=rsqrt)
    compiled = checked(layer)
    x = hidden_states(T)
    x[1, 2] = float("nan")
    for _ in range(2):
        compiled(x)
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 2 and "q has NaN" in told[0] and "k has NaN" in told[1]
    assert "the first at [1, 2, 0, 0]" in told[0] and "tests/" in told[0]


def wrong_by(factor: float) -> Any:
    """A kernel library whose k is not quite right."""

    def run(**call: Any) -> Any:
        record = call.pop("record")
        op = reference.norm_rope_store_ if record.store else reference.norm_rope
        call["k"] = call["k"] * factor
        return op(**call, record=record)

    return run


@torch.no_grad()
@pytest.mark.cpu
@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_a_kernel_that_differs_is_told_with_numbers(factor: float, caplog: Any) -> None:
    # No norm, which would take the factor out again.
    layer = Layer(by_setitem)
    layer.norm = None
    with fxfuse.register_provider(
        "nearly", wrong_by(factor), ops=["norm_rope", "norm_rope_store_"], version=str(factor)
    ):
        compiled, memory = checked(layer, "inductor"), caches()
        for _ in range(2):
            compiled(hidden_states(T), *memory)
    told = [r.getMessage() for r in caplog.records if "differs" in r.getMessage()]
    assert len(told) == (factor != 1.0)
    if told:
        assert told[0].startswith("fxfuse: k_cache differs from the reference")
        assert "tests/spellings.py:" in told[0]
        count = f"of {B * T * G * D} numbers"
        assert count in told[0] and "one rounding of torch.float32" in told[0]


def test_gradients_pass_through(caplog: Any) -> None:
    layer, x = Attention(norm=rsqrt), hidden_states(T)
    want = torch.autograd.grad(layer(x).square().sum(), layer.project.weight)
    got = torch.autograd.grad(checked(layer, "aot_eager")(x).square().sum(), layer.project.weight)
    torch.testing.assert_close(got, want)
    assert len(fxfuse.last_report().fused) == 1 and not caplog.records


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_norms_are_compared(dtype: torch.dtype, caplog: Any) -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        total = x + residual
        wide = total.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return total, weight * y.to(x.dtype)

    x, r = torch.randn(3, 7, 64).to(dtype), torch.randn(3, 7, 64).to(dtype)
    checked(block, gate="always")(x, r - x, torch.ones(64, dtype=dtype))
    assert len(fxfuse.last_report().fused) == 1 and not caplog.records


@torch.no_grad()
@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_environment_turns_it_on(value: str, on: bool, monkeypatch: Any) -> None:
    monkeypatch.setenv("FXFUSE_DEBUG", value)
    seen = len(debug_checks._compared)
    torch.compile(Attention(), backend=fxfuse.Backend(compiler="eager"))(hidden_states(T))
    assert (len(debug_checks._compared) > seen) == on


@torch.no_grad()
def test_without_it_the_graph_holds_no_check() -> None:
    seen = len(debug_checks._compared)
    torch.compile(Attention(), backend=fxfuse.Backend(compiler="eager"))(hidden_states(T))
    assert len(debug_checks._compared) == seen


def test_backends_with_and_without_are_unlike() -> None:
    assert fxfuse.Backend(debug=True) != fxfuse.Backend()
    assert repr(fxfuse.Backend(debug=True)) == "fxfuse.Backend(debug=True)"


@pytest.mark.parametrize("name", ["qk_norm_rope", "store", "add"])
def test_opcheck(name: str) -> None:
    with Calls() as calls:
        by_name(name, *operands(T))
    (op, args), checks = calls.seen[0], torch.ops.fxfuse_debug
    given = (*args[:-1], args[-1].replace('"', "'"), f"opcheck of {name}")
    called = op._schema.name.removeprefix("fxfuse::")
    torch.library.opcheck(getattr(checks, f"before_{called}").default, given)
    torch.library.opcheck(getattr(checks, f"after_{called}").default, (*op(*args), *given))
