"""The entry: settings, errors, reports, and what torch.compile's users must not feel."""

from __future__ import annotations

import json
import logging
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import passes
from tests.spellings import Rope, llama, rsqrt
from tests.toys import (
    Attention,
    Layer,
    assert_like,
    by_index_copy,
    caches,
    explain,
    hidden_states,
    stages,
)

pytestmark = pytest.mark.null
T = 5


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    passes._warned.clear()


def no_partner(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x * sin


@torch.no_grad()
def compiled(toy: Any, x: Tensor, *memory: Tensor, **settings: Any) -> fxfuse.Report:
    """The report of one compile of a toy, whose result is eager's."""
    backend = fxfuse.Backend(**{"compiler": "eager", **settings})
    copies = [t.clone() for t in memory]
    want = toy(x, *copies)
    assert_like(torch.compile(toy, backend=backend)(x, *memory), want)
    assert_like(list(memory), copies)
    report = fxfuse.last_report()
    assert report is not None
    return report


# --- settings ----------------------------------------------------------------------------------


def test_strict_names_what_was_not_fused() -> None:
    # torch wraps what a backend raises, with its text.
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        compiled(Attention(Rope(no_partner)), hidden_states(), strict=True)
    assert isinstance(error.value.inner_exception, fxfuse.FxfuseError)
    text = str(error.value)
    assert "node q" in text and "node k" in text and "has no partner" in text
    assert "test_entry.py:" in text and "strict=False" in text


def test_strict_is_silent_where_every_rotation_is_fused() -> None:
    assert len(compiled(Attention(), hidden_states(), strict=True).fused) == 1


def test_strict_minds_rotations_not_stores() -> None:
    def finish(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, *rest: Tensor) -> Any:
        seen = by_index_copy(q, k, v, ks, *rest), k.sum()
        return seen, (ks * 2).sum()

    assert compiled(Layer(finish), hidden_states(T), *caches(), strict=True).fused


def test_disabled_stores_stay_the_models() -> None:
    report = compiled(Layer(by_index_copy), hidden_states(T), *caches(), disable=("store",))
    assert stages(report) == [""]


def test_disabled_attention_leaves_everything() -> None:
    report = compiled(Attention(), hidden_states(), disable=("attention",))
    assert (report.fused, report.notes) == ([], ["disabled by settings"])


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        ({"compiler": "tvm"}, "compiler is 'tvm', wanted one of inductor, aot_eager, eager"),
        ({"numerics": "exact"}, "numerics is 'exact', wanted one of inductor, graph"),
        ({"disable": ("rope",)}, "disable is 'rope', wanted one of attention, store"),
        ({"disable": ("store", "norm")}, "disable is 'norm'"),
    ],
)
def test_a_wrong_setting_says_what_was_wanted(wrong: dict[str, Any], wanted: str) -> None:
    with pytest.raises(fxfuse.FxfuseError, match=wanted):
        fxfuse.Backend(**wrong)


def test_an_unknown_setting_is_an_error() -> None:
    with pytest.raises(TypeError, match="fuse_everything"):
        fxfuse.Backend(fuse_everything=True)


def test_the_graphs_own_rounding_points_leave_the_graph() -> None:
    report = compiled(Attention(), hidden_states(), numerics="graph")
    assert report.fused == [] and "numerics='graph'" in report.notes[0]


def test_inductors_rounding_points_leave_the_graph() -> None:
    with torch._inductor.config.patch(emulate_precision_casts=True):
        report = compiled(Attention(), hidden_states())
    assert report.fused == [] and "emulate_precision_casts" in report.notes[0]


@pytest.mark.parametrize(
    ("options", "mode"),
    [({"no_such_option": 1}, None), ({"max_autotune": False}, "reduce-overhead")],
)
def test_wrong_options_raise_as_they_do_for_inductor(options: Any, mode: Any) -> None:
    def compile_with(backend: Any) -> str:
        torch._dynamo.reset()
        with pytest.raises(Exception) as error, torch.no_grad():
            toy = Attention()
            torch.compile(toy, backend=backend, options=options, mode=mode)(hidden_states())
        return str(error.value)

    want = compile_with("inductor").splitlines()[0]
    assert want.split(":")[-1].strip() in compile_with(fxfuse.backend)


# --- backends as values ------------------------------------------------------------------------


def test_backends_compare_hash_and_pickle_by_their_settings() -> None:
    one, same = fxfuse.Backend(strict=True), fxfuse.Backend(strict=True)
    assert one == same and hash(one) == hash(same) and pickle.loads(pickle.dumps(one)) == one
    assert one != fxfuse.Backend() and one != "fxfuse"
    assert repr(one) == "fxfuse.Backend(strict=True)"


def test_an_equal_backend_compiles_nothing_anew() -> None:
    toy, x = Attention(), hidden_states()
    compiled(toy, x)
    graphs = fxfuse.counts()["attention"]
    compiled(toy, x)
    assert fxfuse.counts()["attention"] == graphs
    compiled(toy, x, disable=("store",))
    assert fxfuse.counts()["attention"] == graphs + 1


# --- reports -----------------------------------------------------------------------------------


def test_explain_is_fresh_each_time_and_needs_no_reset() -> None:
    toy, x = Attention(norm=rsqrt), hidden_states()
    compiled(toy, x)
    first, second = explain(toy, x), explain(toy, x)
    assert first.fused == second.fused and len(first.fused) == 1
    assert str(first.fused[0].record) == str(second.fused[0].record)


def test_the_last_report_and_the_counts_follow_each_compile() -> None:
    before = fxfuse.counts()
    report = compiled(Layer(by_index_copy), hidden_states(T), *caches())
    assert report is fxfuse.last_report()
    after = fxfuse.counts()
    assert {key: after[key] - before[key] for key in ("attention", "store")} == {
        "attention": 1,
        "store": 1,
    }


class Apart(Attention):
    """q and k turn by tables of their own, so that each is a site."""

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return llama(q, cos, sin), llama(k, cos * 0.5, sin * 0.5)


@torch.no_grad()
def test_an_attention_whose_q_and_k_do_not_join_counts_once() -> None:
    class TwoLayers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Apart(), Apart()])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x).sum() + self.layers[1](x + 1).sum()

    before = fxfuse.counts()
    report = fxfuse.explain(TwoLayers(), hidden_states(), compiler="eager")
    assert [site.kind for site in report.fused] == ["attention", "key"] * 2
    assert fxfuse.counts()["attention"] - before["attention"] == 2


def test_a_report_as_json_and_as_text() -> None:
    report = compiled(Layer(by_index_copy), hidden_states(T), *caches())
    data = json.loads(report.to_json())
    (fused,) = data["fused"]
    assert fused["stages"] == ["rms_norm", "rope", "store(k,v)"]
    assert "spellings.py:" in fused["where"] and fused["op"] == "fxfuse::norm_rope_store_"
    assert fused["provider"] == "reference" and fused["record"]["q"]["channels"] == 16
    assert {"lens", "read", "plan", "rewrite", "fxfuse", "compile"} <= data["milliseconds"].keys()
    assert "milliseconds" not in json.loads(report.to_json(timings=False))
    text = str(report)
    assert "1 fused, 0 refused" in text and "rms_norm + rope + store(k,v)" in text


def test_a_refusal_says_stage_node_reason_and_place() -> None:
    report = compiled(Attention(Rope(no_partner)), hidden_states())
    refusal = json.loads(report.to_json())["refused"][0]
    assert refusal.keys() >= {"stage", "node", "reason", "where"}
    assert refusal["stage"] == "decode" and "test_entry.py:" in refusal["where"]


def test_debug_logging_prints_the_report(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fxfuse"):
        compiled(Attention(), hidden_states())
    assert any("1 fused, 0 refused" in record.getMessage() for record in caplog.records)


# --- graphs with nothing to read ---------------------------------------------------------------


def test_a_graph_with_nothing_to_fuse_goes_through() -> None:
    report = compiled(nn.Sequential(nn.Linear(32, 8), nn.GELU()), hidden_states())
    assert (report.fused, report.refused, report.notes) == ([], [], [])


@pytest.mark.parametrize("stage", ["look", "read", "plan", "rewrite"])
def test_an_error_of_ours_is_one_warning_and_a_right_result(
    stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"no {stage}")

    monkeypatch.setattr(passes, stage, fail)
    with caplog.at_level(logging.WARNING, "fxfuse"):
        for _ in range(2):
            torch._dynamo.reset()
            report = compiled(Attention(), hidden_states())
    assert report.fused == [] and f"no {stage}" in report.notes[0]
    assert [r.levelname for r in caplog.records] == ["WARNING"]


# --- the user's process ------------------------------------------------------------------------


def state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch._inductor.config.post_grad_custom_pre_pass,
        torch.compiler.config.cache_key_tag,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", [None, "cpu", "meta"])
def test_the_users_state_is_neither_felt_nor_touched(dtype: Any, device: Any) -> None:
    from fxfuse.patterns import prove

    toy, x = Attention(norm=rsqrt), hidden_states()
    positions = torch.arange(T)
    toy.tables = lambda _: Attention.tables(toy, positions)  # type: ignore[method-assign]
    prove._proved.clear()
    old = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        before = state()
        report = explain(toy, x)
        assert state() == before
    finally:
        torch.set_default_dtype(old)
        torch.set_default_device(None)
    assert len(report.fused) == 1


def test_two_threads_compile_two_models() -> None:
    toys = [Attention(norm=rsqrt, eps=(1e-5, 1e-5)), Layer(lambda q, k, v: q + k.sum())]
    reports: dict[int, Any] = {}

    def work(number: int) -> None:
        try:
            with torch.no_grad():
                want = toys[number](hidden_states())
                got = torch.compile(toys[number], backend=fxfuse.Backend(compiler="eager"))(
                    hidden_states()
                )
            assert_like(got, want)
            reports[number] = explain(toys[number], hidden_states())
        except Exception as error:
            reports[number] = error

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(reports[n].fused) for n in range(2)] == [1, 1]
    assert reports[0].fused[0].eps == (1e-5, 1e-5)


# --- through Inductor --------------------------------------------------------------------------


@pytest.mark.cpu
@torch.no_grad()
def test_a_users_own_inductor_pass_still_runs() -> None:
    ran: list[str] = []

    class Pass(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            ran.extend(str(n.target) for n in graph.nodes if "fxfuse" in str(n.target))

        def uuid(self) -> str:
            return "tests.test_entry"

    toy, x, own = Attention(norm=rsqrt), hidden_states(), Pass()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=own, fx_graph_cache=False):
        before = state()
        got = torch.compile(toy, backend=fxfuse.backend, options={"max_autotune": False})(x)
        assert state() == before
    assert ran == ["fxfuse.norm_rope.default"]
    assert_like(got, toy(x))
