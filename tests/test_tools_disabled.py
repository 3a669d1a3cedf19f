"""`with fxfuse.disabled():` what is compiled inside is left as it came, and nothing else is."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse.report import collected
from tests.spellings import Rope, rsqrt
from tests.test_refusals import no_partner
from tests.toys import Attention, hidden_states

pytestmark = pytest.mark.null
BACKEND = fxfuse.Backend(compiler="eager")


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def compiled(toy: torch.nn.Module) -> Any:
    return torch.compile(toy, backend=BACKEND)


def fused_by(model: Any, x: torch.Tensor) -> list[int]:
    """Sites of each graph that this call compiles."""
    with collected() as report:
        model(x)
    return [len(report.fused)] * report.graphs


def test_inside_nothing_is_fused_and_the_report_says_so() -> None:
    with fxfuse.disabled(), collected() as report:
        compiled(Attention(norm=rsqrt))(hidden_states())
    assert (report.graphs, report.fused, report.refused) == (1, [], [])
    assert report.notes == ["nothing is fused: compiled inside fxfuse.disabled()"]


@pytest.mark.parametrize("fused_first", [True, False])
def test_two_compiled_objects_of_one_model_are_a_and_b(fused_first: bool) -> None:
    toy, x = Attention(norm=rsqrt), hidden_states()
    a, b = compiled(toy), compiled(toy)
    if fused_first:
        assert fused_by(a, x) == [1]
    with fxfuse.disabled():
        assert fused_by(b, x) == [0]
    if not fused_first:
        assert fused_by(a, x) == [1]
    # Each keeps what it is, inside and outside.
    assert fused_by(a, x) == fused_by(b, x) == []
    with fxfuse.disabled():
        assert fused_by(a, x) == fused_by(b, x) == []


def test_one_object_keeps_what_it_was_compiled_to() -> None:
    model, x = compiled(Attention(norm=rsqrt)), hidden_states()
    assert fused_by(model, x) == [1]
    with fxfuse.disabled():
        assert fused_by(model, x) == []
        assert fused_by(model, hidden_states(9)) == [0], "another shape is compiled inside"


def test_it_ends_with_the_block_and_is_for_this_thread_alone() -> None:
    found: list[list[int]] = []

    def work() -> None:
        with torch.no_grad():
            found.append(fused_by(compiled(Attention(norm=rsqrt)), hidden_states()))

    with fxfuse.disabled():
        with fxfuse.disabled():
            pass
        assert fused_by(compiled(Attention()), hidden_states()) == [0]
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [[1]]
    with pytest.raises(ZeroDivisionError), fxfuse.disabled():
        raise ZeroDivisionError
    assert fused_by(compiled(Attention(wide=True, norm=rsqrt)), hidden_states()) == [1]


def test_strict_has_nothing_to_complain_of_inside() -> None:
    strict = fxfuse.Backend(compiler="eager", strict=True)
    toy = Attention(Rope(no_partner))
    with fxfuse.disabled():
        got = torch.compile(toy, backend=strict)(hidden_states())
    assert torch.equal(got, toy(hidden_states()))
    with pytest.raises(Exception, match="has no partner"):
        torch.compile(toy, backend=strict)(hidden_states())
