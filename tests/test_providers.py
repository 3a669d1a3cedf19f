"""register_provider: a user's function in compiled graphs, chosen, declining, failing, removed."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import fxfuse
from fxfuse import reference
from fxfuse.lowering import providers
from fxfuse.patterns.record import AddNorm, Norm
from tests.norm_toys import NormedAttention, Residual, pre_norm
from tests.spellings import rsqrt
from tests.toys import Attention, Layer, by_index_copy, caches, hidden_states

NORM = ("add_rms_norm",)
FACTS = providers.Facts(AddNorm(32, Norm("head", "before", True)), shape=(2, 5, 32))


@pytest.fixture(autouse=True)
def table_and_caches() -> Iterator[None]:
    """The table as it was, afterwards; nothing compiled before counts."""
    torch._dynamo.reset()
    before = list(providers.PROVIDERS)
    with torch.no_grad(), fresh_cache():
        yield
    assert before == providers.PROVIDERS


calls: list[str] = []


def by_reference(**call: Any) -> Any:
    """What a kernel library would compute, and a note that it was asked."""
    record = call.pop("record")
    calls.append(type(record).__name__)
    if isinstance(record, AddNorm):
        return reference.add_rms_norm(**call, record=record)
    if record.store:
        return reference.norm_rope_store_(**call, record=record)
    return reference.norm_rope(**call, record=record)


def run(toy: Any, *args: Any, like: Any = None, **settings: Any) -> fxfuse.Report:
    """The report of a compile by Inductor whose results are eager's."""
    torch._dynamo.reset()
    calls.clear()
    copies = [a.clone() for a in args]
    want = toy(*copies)
    settings = {"gate": "always", **settings}
    got = torch.compile(toy, backend=fxfuse.Backend(**settings))(*args)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(args, tuple(copies))
    report = fxfuse.last_report()
    assert report is not None
    return report


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.null
def test_the_newest_is_asked_first_and_removed_again() -> None:
    with (
        fxfuse.register_provider("first", by_reference, ops=NORM),
        fxfuse.register_provider("second", by_reference, ops=NORM, declines=lambda f: "never"),
    ):
        assert providers.choose("cpu", FACTS) == providers.Choice("first", (("second", "never"),))
    handle = fxfuse.register_provider("elsewhere", by_reference, ops=NORM, devices=("xpu",))
    assert providers.choose("cpu", FACTS).declined[0] == ("elsewhere", "not for cpu")
    handle.remove()
    handle.remove()
    assert providers.choose("cpu", FACTS).provider == "loops"


@pytest.mark.null
def test_ours_are_entries_of_the_same_table() -> None:
    names = {p.name for p in providers.PROVIDERS}
    assert names == {"loops", "triton", "flashinfer", "aiter", "vllm"}


@pytest.mark.null
@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("my lib", {"run": by_reference, "ops": NORM}, "wanted an identifier"),
        ("mine", {"run": by_reference, "ops": ["rms_norm"]}, "wanted some of norm_rope"),
        ("mine", {"run": by_reference, "ops": []}, "wanted some of norm_rope"),
        ("mine", {"ops": NORM}, "wanted run, or lower"),
        ("mine", {"run": by_reference, "lower": by_reference, "ops": NORM}, "wanted run, or lower"),
        ("loops", {"run": by_reference, "ops": NORM}, "remove"),
    ],
)
def test_wrong_registrations_are_errors(name: str, how: Any, reason: str) -> None:
    with pytest.raises(fxfuse.FxfuseError, match=reason):
        fxfuse.register_provider(name, **how)


@pytest.mark.null
def test_who_raises_while_declining_is_dropped_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def declines(facts: providers.Facts) -> str | None:
        raise KeyError("no such arch")

    with (
        caplog.at_level(logging.WARNING, "fxfuse"),
        fxfuse.register_provider("broken", by_reference, ops=NORM, declines=declines),
    ):
        choices = [providers.choose("cpu", FACTS) for _ in range(2)]
    assert [c.provider for c in choices] == ["loops", "loops"]
    assert choices[1].declined[0] == ("broken", "failed declining: KeyError: 'no such arch'")
    (warning,) = caplog.messages
    assert "provider broken is asked no more, it failed declining" in warning


def k_alone(q: Tensor, k: Tensor, v: Tensor, ks: Tensor, vs: Tensor, slots: Tensor) -> Any:
    ks.index_copy_(2, slots, k)
    return q.sum() + v.sum(), ks.sum()


# --- in compiled graphs ------------------------------------------------------------------------


@pytest.mark.cpu
def test_a_plain_function_takes_a_site() -> None:
    with fxfuse.register_provider("mine", by_reference, ops=NORM, devices=("cpu",)):
        report = run(Residual(pre_norm), hidden_states())
    assert [f.provider for f in report.fused] == ["mine"] * 3
    assert calls == ["AddNorm"] * 3
    assert "fxfuse::add_rms_norm by mine" in str(report)


@pytest.mark.cpu
def test_it_takes_norms_and_rotations_with_their_stores() -> None:
    ops = ("norm_rope", "norm_rope_store_")
    with fxfuse.register_provider("mine", by_reference, ops=ops):
        assert [f.provider for f in run(Attention(norm=rsqrt), hidden_states()).fused] == ["mine"]
        assert [f.provider for f in run(NormedAttention(), hidden_states()).fused] == ["mine"]
        stored = run(Layer(by_index_copy), hidden_states(), *caches(), disable=("projection",))
    (fused,) = stored.fused
    assert (fused.provider, fused.record.store is not None) == ("mine", True)
    assert calls == ["Record"]


@pytest.mark.cpu
def test_a_refusal_is_in_the_report() -> None:
    def declines(facts: providers.Facts) -> str | None:
        assert facts.dtypes["x"] is torch.float32 and facts.device == torch.device("cpu")
        return None if facts.record.addends == 1 else f"adds nothing up of {facts.shape}"

    with fxfuse.register_provider("mine", by_reference, ops=NORM, declines=declines):
        report = run(Residual(pre_norm), hidden_states())
    assert [f.provider for f in report.fused] == ["mine", "loops", "loops"]
    reason = "adds nothing up of (2, 5, 32)"
    assert report.fused[1].declined[0] == ("mine", reason)
    assert f"declined 2 × fxfuse::add_rms_norm by mine: {reason}" in str(report)
    assert ["mine", reason] in json.loads(report.to_json())["fused"][1]["declined"]


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("toy", "memory"),
    [
        (Residual(pre_norm), []),
        (NormedAttention(), []),
        (Layer(by_index_copy), caches()),
        (Layer(k_alone), caches()),
    ],
    ids=["sums", "norms", "stores", "one store"],
)
def test_the_report_and_the_lowering_ask_with_the_same_facts(toy: Any, memory: Any) -> None:
    seen: list[providers.Facts] = []

    def declines(facts: providers.Facts) -> str:
        seen.append(facts)
        return "only looking"

    with fxfuse.register_provider("look", by_reference, ops=providers.OPS, declines=declines):
        report = run(toy, hidden_states(), *(m.clone() for m in memory))
    first, second = seen[: len(report.fused)], seen[len(report.fused) :]
    assert first == second and len(first) == len(report.fused) > 0


@pytest.mark.cpu
def test_the_gate_decides_before_any_provider() -> None:
    with fxfuse.register_provider("mine", by_reference, ops=NORM):
        report = run(Residual(pre_norm), hidden_states(), gate="auto")
    assert report.fused == [] and len(report.left) == 3 and calls == []


@pytest.mark.cpu
def test_results_of_another_layout_are_brought_to_the_ops() -> None:
    def transposed(**call: Any) -> Any:
        total, normed = by_reference(**call)
        return total.transpose(0, 1).contiguous().transpose(0, 1), normed.mT.contiguous().mT

    def in_place(*, x: Tensor, residual: Tensor | None, **rest: Any) -> Any:
        total, normed = by_reference(x=x, residual=residual, **rest)
        return (x if residual is None else total), normed

    for function in (transposed, in_place):
        with fxfuse.register_provider("mine", function, ops=NORM, version=function.__name__):
            report = run(Residual(pre_norm), hidden_states())
        assert {f.provider for f in report.fused} == {"mine"}


@pytest.mark.cpu
def test_symbolic_tokens_are_one_graph() -> None:
    toy = Residual(pre_norm)
    with fxfuse.register_provider("mine", by_reference, ops=NORM):
        compiled = torch.compile(toy, backend=fxfuse.Backend(gate="always"), dynamic=True)
        for tokens in (4, 9, 30):
            torch.testing.assert_close(compiled(hidden_states(tokens)), toy(hidden_states(tokens)))
    report = fxfuse.last_report()
    assert report is not None and report.fused[0].provider == "mine"


@pytest.mark.cpu
@pytest.mark.long
def test_under_the_cpp_wrapper() -> None:
    toy, x = Residual(pre_norm), hidden_states()
    with fxfuse.register_provider("mine", by_reference, ops=NORM):
        calls.clear()
        backend = fxfuse.Backend(gate="always")
        compiled = torch.compile(toy, backend=backend, options={"cpp_wrapper": True})
        torch.testing.assert_close(compiled(x), toy(x))
    assert calls == ["AddNorm"] * 3


@pytest.mark.cpu
def test_gradients_of_a_model_whose_norms_it_takes() -> None:
    toy, x = Residual(pre_norm), hidden_states()
    with torch.enable_grad():
        toy(x).square().sum().backward()
        want = [p.grad.clone() for p in toy.parameters()]
        toy.zero_grad()
        with fxfuse.register_provider("mine", by_reference, ops=NORM):
            calls.clear()
            compiled = torch.compile(toy, backend=fxfuse.Backend(gate="always"))
            compiled(x).square().sum().backward()
    assert calls == ["AddNorm"] * 3
    torch.testing.assert_close([p.grad for p in toy.parameters()], want)


@pytest.mark.cpu
def test_a_lowering_of_boxes_is_a_provider_too() -> None:
    from fxfuse.lowering import norm_launch

    lowered: list[str] = []

    def lower(name: str, args: tuple[Any, ...], record: AddNorm) -> Any:
        lowered.append(name)
        return norm_launch.loops(name, args, record)

    with fxfuse.register_provider("mine", lower=lower, ops=NORM):
        report = run(Residual(pre_norm), hidden_states())
    assert lowered == ["add_rms_norm"] * 3
    assert {f.provider for f in report.fused} == {"mine"}


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.cpu
def test_who_raises_while_lowering_is_dropped_and_the_graph_is_compiled_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def lower(name: str, args: tuple[Any, ...], record: AddNorm) -> Any:
        raise RuntimeError("no kernel for this arch\nand a trace")

    with (
        caplog.at_level(logging.WARNING, "fxfuse"),
        fxfuse.register_provider("broken", lower=lower, ops=NORM),
        fxfuse.register_provider("mine", by_reference, ops=NORM, declines=lambda f: "no"),
    ):
        report = run(Residual(pre_norm), hidden_states())
        again = run(Residual(pre_norm), hidden_states(7))
    for one in (report, again):
        assert [f.provider for f in one.fused] == ["loops"] * 3
        reason = "failed lowering: RuntimeError: no kernel for this arch"
        assert ("broken", reason) in one.fused[0].declined
        assert reason in str(one)
    assert len(caplog.messages) == 1


@pytest.mark.cpu
def test_outside_of_our_backend_the_next_one_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def lower(name: str, args: tuple[Any, ...], record: AddNorm) -> Any:
        raise RuntimeError("no kernel")

    providers.register()
    op, text = torch.ops.fxfuse.add_rms_norm.default, FACTS.record.to_text()
    x, weight = hidden_states(), torch.ones(32)
    with fxfuse.register_provider("broken", lower=lower, ops=NORM):
        got = torch.compile(lambda x, w: op(x, None, None, w, 1e-5, text))(x, weight)
    torch.testing.assert_close(got, op(x, None, None, weight, 1e-5, text))
    assert "provider broken" in caplog.text


def raising(**call: Any) -> Any:
    raise OSError("no libkernel.so")


def too_short(**call: Any) -> Any:
    return by_reference(**call)[1]


def too_wide(**call: Any) -> Any:
    total, normed = by_reference(**call)
    return total, normed.double()


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raising, "OSError: no libkernel.so"),
        (too_short, "TypeError: got Tensor, wanted a tuple of 2 results"),
        (too_wide, "TypeError: result 1: got (2, 5, 32) torch.float64, wanted (2, 5, 32)"),
    ],
)
def test_who_raises_while_running_gives_way_to_the_reference(
    function: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with fxfuse.register_provider("broken", function, ops=NORM, version=function.__name__):
        run(Residual(pre_norm), hidden_states())
        again = run(Residual(pre_norm), hidden_states(7))
    assert [f.provider for f in again.fused] == ["loops"] * 3
    (warning,) = [m for m in caplog.messages if "broken" in m]
    assert f"failed running: {reason}" in warning


@pytest.mark.cpu
def test_a_store_that_fails_half_way_is_done_again(caplog: pytest.LogCaptureFixture) -> None:
    def half_way(*, k_cache: Tensor, slots: Tensor, **call: Any) -> Any:
        k_cache[:, :, slots] = 7.0
        raise RuntimeError("half way")

    with fxfuse.register_provider("broken", half_way, ops=("norm_rope_store_",)):
        run(Layer(by_index_copy), hidden_states(), *caches(), disable=("projection",))
    assert "failed running: RuntimeError: half way" in caplog.text


# --- Inductor's caches -------------------------------------------------------------------------

TWICE = """
import json, sys
import torch, fxfuse
from torch._dynamo.utils import counters

def one(*, x, weight, eps, record, **rest):
    return None, torch.nn.functional.rms_norm(x, (8,), weight, eps)

def other(*, x, weight, eps, record, **rest):
    return None, torch.nn.functional.rms_norm(x, (8,), weight, eps)

def toy(x, w):
    return torch.nn.functional.rms_norm(x, (8,), w, 1e-5).sin()

for name in sys.argv[1:]:
    function = {"one": one, "other": other}[name]
    fxfuse.register_provider(name, function, ops=["add_rms_norm"], version=name)
with torch.no_grad():
    compiled = torch.compile(toy, backend=fxfuse.Backend(gate="always"))
    compiled(torch.ones(3, 8), torch.nn.Parameter(torch.ones(8)))
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
(site,) = fxfuse.last_report().fused
print(json.dumps([site.provider, hits]))
"""


@pytest.mark.cpu
@pytest.mark.long
def test_the_table_is_in_the_keys_of_inductors_caches(tmp_path: Path) -> None:
    def in_a_process(*names: str) -> Any:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", TWICE, *names]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        provider, hits = json.loads(done.stdout.splitlines()[-1])
        return provider, hits > 0

    assert in_a_process() == ("loops", False)
    assert in_a_process("one") == ("one", False)
    assert in_a_process("one") == ("one", True)
    assert in_a_process("one", "other") == ("other", False)
    assert in_a_process() == ("loops", True)
