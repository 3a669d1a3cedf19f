"""Garbage is collected after the passes, as it was before them."""

from __future__ import annotations

import gc

import pytest
import torch

import fxfuse
from fxfuse import passes
from fxfuse.garbage import collected_later
from tests.toys import Layer, by_index_copy, caches, hidden_states

pytestmark = pytest.mark.null


@pytest.mark.parametrize("on", [True, False])
def test_as_before(on: bool) -> None:
    was = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        with pytest.raises(KeyError), collected_later():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == on
    finally:
        (gc.enable if was else gc.disable)()


def test_not_while_a_graph_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    given = passes.plan

    def plan(*args, **kwargs):
        seen.append(gc.isenabled())
        return given(*args, **kwargs)

    monkeypatch.setattr(passes, "plan", plan)
    torch._dynamo.reset()
    compiled = torch.compile(Layer(by_index_copy), backend=fxfuse.Backend(compiler="eager"))
    with torch.no_grad():
        compiled(hidden_states(), *caches())
    assert seen == [False] and gc.isenabled()
