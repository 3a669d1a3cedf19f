"""The gate: what it leaves to the compiler, what the report says of it, and who overrides it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fxfuse import passes
from fxfuse.lowering import gate
from fxfuse.patterns.record import DecodeAttention, GroupedHeads
from fxfuse.settings import Settings
from tests.norm_toys import Residual, compiled, pre_norm
from tests.spellings import rsqrt
from tests.toys import Attention, hidden_states

pytestmark = pytest.mark.null


def test_what_the_gate_leaves_is_told_and_the_graph_stays() -> None:
    given: list[Any] = []
    made: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        fused, report = passes.fuse_graph(gm, Settings(strict=True))
        given.append(gm)
        made.append((fused, report))
        return gm.forward

    with torch.no_grad():
        torch._dynamo.reset()
        torch.compile(Residual(pre_norm), backend=backend)(hidden_states())
    (fused, report), (gm,) = made[0], given
    assert fused is gm and report.fused == [] and report.refused == []
    assert "left 3 × add + rms_norm: Inductor's own kernel is as fast (target cpu)" in str(report)
    assert [x["kind"] for x in json.loads(report.to_json())["left"]] == ["add_rms_norm"] * 3


def test_never_leaves_rotations_too() -> None:
    report = compiled(Attention(norm=rsqrt), hidden_states(), gate="never", strict=True)
    assert report.fused == [] and [x.kind for x in report.left] == ["attention"]
    assert "left 1 × norm and rotation of q and k: gate='never'" in str(report)


def test_the_table_is_told_by_its_kinds() -> None:
    assert gate.decide("cuda", "attention", gate.Facts(rows=1)).fuse
    assert not gate.decide("cuda", "norm", gate.Facts()).fuse
    assert not gate.decide("cpu", "norm", gate.Facts()).fuse
    assert not gate.decide("cuda", "add_rms_norm", gate.Facts(rows=4096)).fuse
    unknown = gate.decide("cuda", "dropout", gate.Facts())
    assert (unknown.fuse, unknown.reason) == (False, "nobody has measured it")


def test_grouped_heads_are_given_where_they_were_measured() -> None:
    def fused(
        target: str, rows: int | None, has_mask: bool, dtype: str, arch: str = "sm_90"
    ) -> bool:
        record = GroupedHeads(16, 8, 128, has_mask, dtype)
        return gate.decide(target, "grouped_heads", gate.Facts(rows, record, arch)).fuse

    assert fused("cuda", 1, True, "bfloat16") and fused("cuda", 256, True, "bfloat16")
    for rows, has_mask, dtype in (
        (257, True, "bfloat16"), (None, True, "bfloat16"), (1, False, "bfloat16"),
        (1, True, "float32"), (1, True, "float16"),
    ):  # fmt: skip
        assert not fused("cuda", rows, has_mask, dtype)
    assert not fused("cuda", 1, True, "bfloat16", "gfx942")
    assert fused("cpu", None, False, "float32") and not fused("xpu", 1, True, "bfloat16")


def test_attention_with_one_query_is_taken_where_it_was_measured() -> None:
    def fused(target: str = "cuda", rows: int | None = 1, arch: str = "sm_90", **how: Any) -> bool:
        given = {"slots": 1024, "mask": "bool", "dtype": "bfloat16"} | how
        record = DecodeAttention(16, 8, 128, 128, **given)
        return gate.decide(target, "decode_attention", gate.Facts(rows, record, arch)).fuse

    assert fused() and fused(rows=16) and fused(slots=4096) and fused(mask="bfloat16")
    assert not fused(rows=17) and not fused(rows=None) and not fused(slots=4097)
    assert not fused(mask="") and not fused(dtype="float32") and not fused(dtype="float16")
    assert not fused(arch="gfx942") and not fused(arch="sm_100")
    assert not fused(target="cpu", arch="") and not fused(target="xpu", arch="")


def test_entries_by_rows_fit_known_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    small = gate.Entry("attention", "cuda", gate.Decision(False, "small", 0.9), most_rows=8)
    monkeypatch.setattr(gate, "TABLE", (small, *gate.TABLE))
    fused = {n: gate.decide("cuda", "attention", gate.Facts(n)).fuse for n in (1, 8, 9, None)}
    assert fused == {1: False, 8: False, 9: True, None: True}
