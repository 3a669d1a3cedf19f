"""Attention with one query row over repeated heads becomes an op with a kernel of its own.

In: attention over caches, in toys and in tiny models of transformers. Out: results as eager has
them, which attention is taken, and the reason where torch's keeps its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxfuse
from fxfuse.patterns.record import DecodeAttention
from fxfuse.settings import Settings
from tests.models.families import FAMILIES
from tests.models.tiny import (
    PROMPT,
    SLOTS,
    assert_close,
    assert_same_cache,
    build,
    static_cache,
    token_ids,
)
from tests.test_grouped import REPEATS, SETTINGS, B, D, G, H, S, by_expand, check, draw, rows
from tests.toys import Layer, assert_like, caches, hidden_states

pytestmark = pytest.mark.null
FILLED = torch.arange(S) < 5


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **how: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, by_expand(k), by_expand(v), attn_mask=mask, **how)


def kinds(report: fxfuse.Report) -> list[str]:
    return [f.kind for f in report.fused]


def told(report: fxfuse.Report) -> list[str]:
    return [r.reason for r in report.refused if r.stage == "decode_attention"]


@pytest.mark.parametrize("name", REPEATS)
def test_each_spelling_of_repeated_heads(name: str) -> None:
    repeat = REPEATS[name]

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), mask, scale=0.3)

    report, heads = check(run, *rows(1), draw(B, 1, 1, S, seed=9))
    (fused,) = report.fused
    assert fused.kind == "decode_attention" and fused.stages == ("decode_attention",)
    assert fused.op == "fxfuse::decode_attention" and fused.provider == "reference"
    assert fused.record == DecodeAttention(H, G, D, D, S, "float32", "float32")
    assert heads == [], "torch's attention is called no more"


MASKS = {
    "none": None,
    "boolean": FILLED[None, None, None],
    "of two axes": FILLED[None],
    "for each batch row": (torch.arange(S) >= torch.arange(B)[:, None])[:, None, None],
    "for each head": torch.arange(S) <= torch.arange(H)[:, None, None],
    "added": torch.zeros(S).masked_fill(~FILLED, -torch.inf)[None, None, None],
    "added, the least number": torch.zeros(1, 1, 1, S).masked_fill(~FILLED, torch.finfo().min),
    "nothing is attended": torch.zeros(1, 1, 1, S, dtype=torch.bool),
    "expanded": FILLED[None, None, None].expand(B, H, 1, S),
}


@pytest.mark.parametrize("name", MASKS)
def test_each_form_of_mask(name: str) -> None:
    mask = MASKS[name]
    given = [] if mask is None else [mask]
    report, _ = check(attended, *rows(1), *given)
    assert kinds(report) == ["decode_attention"]
    assert report.fused[0].record.mask == ("" if mask is None else str(mask.dtype)[6:])


def test_one_query_that_is_causal_attends_slot_0_alone_and_stays_torchs() -> None:
    report, heads = check(lambda q, k, v: attended(q, k, v, is_causal=True), *rows(1))
    assert kinds(report) == ["grouped_heads"] and heads == [(H, G, G)]
    assert ["causal" in r for r in told(report)] == [True]
    q, k, v = rows(1)
    first = by_expand(v)[:, :, :1]
    torch.testing.assert_close(attended(q, k, v, is_causal=True), first)


def test_more_queries_are_asked_nothing() -> None:
    report, heads = check(attended, *rows(2))
    assert kinds(report) == ["grouped_heads"] and heads == [(H, G, G)]
    assert told(report) == [] and not report.left


def test_sizes_that_only_the_run_knows_stay_torchs() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attended(q, k, v)

    q, k, v = rows(1, 13)
    for x in (k, v):
        torch._dynamo.mark_dynamic(x, 2)
    report, heads = check(run, q, k, v)
    assert kinds(report) == ["grouped_heads"] and heads == [(H, G, G)]
    assert ["symbolic" in r for r in told(report)] == [True]


def test_training_stays_torchs() -> None:
    leaves = [x.requires_grad_() for x in rows(1)]
    compiled = torch.compile(
        lambda *x: attended(*x), backend=fxfuse.Backend(compiler="aot_eager", gate="always")
    )
    compiled(*leaves).sum().backward()
    got = [x.grad for x in leaves]
    leaves = [x.requires_grad_() for x in rows(1)]
    attended(*leaves).sum().backward()
    assert_like(got, [x.grad for x in leaves])
    report = fxfuse.last_report()
    assert kinds(report) == ["grouped_heads"] and ["no gradient" in r for r in told(report)]


def test_autocast_keeps_the_models_casts() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attended(q, k, v)

    report, _ = check(run, *rows(1))
    assert "decode_attention" not in kinds(report)


def test_settings_leave_it() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attended(q, k, v)

    for stage, wanted in (("decode_attention", ["grouped_heads"]), ("grouped_heads", [])):
        torch._dynamo.reset()
        settings = dataclasses.replace(SETTINGS, disable=(stage,))
        report, _ = check(run, *rows(1), settings=settings)
        assert kinds(report) == wanted


def test_a_cpu_keeps_torchs_attention_unless_it_is_asked_for() -> None:
    report, heads = check(attended, *rows(1), settings=Settings(compiler="eager"))
    assert kinds(report) == ["grouped_heads"] and heads == [(H, G, G)]
    assert report.left == [], "nobody would look for the stage there"


def test_behind_a_store() -> None:
    """It reads the caches after they are written, and the prelude still finds its place."""

    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
        ks.index_copy_(2, slots, k)
        vs.index_copy_(2, slots, v)
        return attended(q, ks, vs, FILLED[None, None, None])

    for compiler in ("eager", "aot_eager"):
        torch._dynamo.reset()
        settings = dataclasses.replace(SETTINGS, compiler=compiler)
        given = (hidden_states(1), *caches()[:2], torch.tensor([4]))
        report, heads = check(Layer(finish), *given, settings=settings)
        assert heads == []
        assert [f.stages[-1] for f in report.fused] == ["store(k,v)", "decode_attention"]


def test_what_is_written_after_it_was_repeated() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = by_expand(k)
        k.mul_(2)
        return F.scaled_dot_product_attention(q, wide, by_expand(v))

    report, heads = check(run, *rows(1))
    assert heads == [(H, H, H)] and kinds(report) == []


# --- models of transformers ------------------------------------------------------------------

STEPS = 3


def decoded(name: str, gate: str = "always", **config: Any) -> fxfuse.Report:
    """Logits and caches are eager's through a prompt and some tokens; the last graph's report."""
    model = build(FAMILIES[name], **config)
    want_kv, got_kv = static_cache(model), static_cache(model)
    compiled = torch.compile(
        model, backend=fxfuse.Backend(compiler="aot_eager", gate=gate), dynamic=False
    )
    chat = [token_ids(PROMPT), *(token_ids(1, seed=10 + step) for step in range(STEPS))]
    with torch.no_grad():
        for ids in chat:
            got = compiled(ids, past_key_values=got_kv, use_cache=True).logits
            assert_close(got, model(ids, past_key_values=want_kv, use_cache=True).logits, "logits")
    assert_same_cache(got_kv, want_kv, "at the end")
    report = fxfuse.last_report()
    assert report is not None
    return report


@pytest.mark.parametrize("name", ["qwen3", "llama", pytest.param("gemma3", marks=pytest.mark.long)])
def test_each_layer_of_a_model_decodes_by_it(name: str) -> None:
    report = decoded(name)
    found = [f.record for f in report.fused if f.kind == "decode_attention"]
    assert len(found) == FAMILIES[name].rotary and "grouped_heads" not in kinds(report)
    assert {r.mask for r in found} == {"bool"} and found[-1].slots == SLOTS


def test_sliding_windows_that_are_full() -> None:
    report = decoded("gemma3", sliding_window=4)
    found = [f.record for f in report.fused if f.kind == "decode_attention"]
    assert sorted(r.slots for r in found) == [4, SLOTS]


@pytest.mark.long
def test_attention_with_sinks_is_not_taken() -> None:
    report = decoded("gpt_oss")
    assert "decode_attention" not in kinds(report) and told(report) == []


@pytest.mark.long
def test_two_models_have_graphs_of_their_own() -> None:
    for name in ("qwen3", "llama"):
        assert kinds(decoded(name)).count("decode_attention") == FAMILIES[name].rotary
