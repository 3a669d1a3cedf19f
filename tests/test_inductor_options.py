"""Options of Inductor that a user sets beside the backend: fused, and right, under each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxfuse
from tests.toys import Layer, T, assert_like, by_index_copy, caches, hidden_states, stages

pytestmark = pytest.mark.cpu

OPTIONS: dict[str, dict[str, Any]] = {
    "cpp_wrapper": {"cpp_wrapper": True},
    "combo_kernels": {"combo_kernels": True},
    "max_autotune": {"max_autotune": True},
    "coordinate_descent_tuning": {"coordinate_descent_tuning": True},
    "freezing": {"freezing": True},
    "deterministic": {"deterministic": True},
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def ran(run: Any) -> list[torch.Tensor]:
    memory = caches()
    with torch.no_grad():
        return [run(hidden_states(T), *memory), *memory[:2]]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_nothing_but_itself(name: str) -> None:
    (option,) = OPTIONS[name]
    if not hasattr(torch._inductor.config, option):
        pytest.skip(f"this torch has no option {option}")
    layer, before = Layer(by_index_copy), getattr(torch._inductor.config, option)
    got = ran(torch.compile(layer, backend=fxfuse.backend, options=OPTIONS[name]))
    assert_like(got, ran(layer))
    assert stages(fxfuse.last_report()) == ["store(k,v)"]
    assert getattr(torch._inductor.config, option) == before


def test_deterministic_algorithms_of_torch() -> None:
    layer = Layer(by_index_copy)
    torch.use_deterministic_algorithms(True)
    try:
        got = ran(torch.compile(layer, backend=fxfuse.backend))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_like(got, ran(layer))
    assert stages(fxfuse.last_report()) == ["store(k,v)"]


def test_runs_are_bitwise_equal() -> None:
    run = torch.compile(Layer(by_index_copy), backend=fxfuse.backend)
    first = ran(run)
    for _ in range(5):
        assert all(map(torch.equal, ran(run), first))


def test_after_a_reset_it_compiles_anew() -> None:
    layer = Layer(by_index_copy)
    run, before = torch.compile(layer, backend=fxfuse.Backend(strict=True)), fxfuse.counts()
    first = ran(run)
    torch.compiler.reset()
    assert all(map(torch.equal, ran(run), first))
    assert fxfuse.counts()["store"] - before["store"] == 2


def test_two_settings_in_one_process_are_two_compiles() -> None:
    layer = Layer(by_index_copy)
    for backend, stored in ((fxfuse.backend, 1), (fxfuse.Backend(disable=("store",)), 0)):
        before = fxfuse.counts()["store"]
        assert_like(ran(torch.compile(layer, backend=backend)), ran(layer))
        assert fxfuse.counts()["store"] - before == stored


def test_without_a_compiler_the_error_is_inductors() -> None:
    def told(backend: Any) -> str:
        torch._dynamo.reset()
        missing = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
        with torch._inductor.config.patch(missing), pytest.raises(Exception) as error:
            ran(torch.compile(Layer(by_index_copy), backend=backend))
        return type(getattr(error.value, "inner_exception", error.value)).__name__

    assert told(fxfuse.backend) == told("inductor") == "InvalidCxxCompiler"
