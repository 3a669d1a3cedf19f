"""`fxfuse doctor`: what it says of a machine, and that a wrong kernel makes it fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse import cli, reference
from fxfuse.lowering import libraries, providers
from fxfuse.patterns.record import AddNorm
from fxfuse.tools import doctor, self_test


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.null
def test_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_DEBUG", "1")
    here = dict(doctor.found())
    assert here["fxfuse"].startswith(fxfuse.__version__)
    assert here["torch"] == torch.__version__
    assert "loops, compiled by Inductor to C++" in here["CPU"]
    assert here["Inductor passes"] == "none but Inductor's own"
    assert "FXFUSE_DEBUG=1" in here["environment"]
    assert here["caches"].endswith("can be written") and "CANNOT" not in here["caches"]
    for library in libraries.LIBRARIES:
        assert (here[library.name] == "not installed") is not library.installed()


@pytest.mark.null
def test_a_pass_of_somebody_else_is_named() -> None:
    def tidy(graph: torch.fx.Graph) -> None: ...

    with torch._inductor.config.patch(post_grad_custom_pre_pass=tidy, emulate_precision_casts=True):
        here = dict(doctor.found())
    assert here["Inductor passes"] == "post_grad_custom_pre_pass: tidy"
    assert "nothing is fused" in here["Inductor config"]


@pytest.mark.null
def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    told = doctor.cache_folder()
    assert "CANNOT be written" in told and "set TORCHINDUCTOR_CACHE_DIR" in told


def by_reference(**call: Any) -> Any:
    return reference.norm_rope_store_(**call)


def wrong_sign(**call: Any) -> Any:
    return reference.norm_rope_store_(**call | {"sin": -call["sin"]})


def failing(**call: Any) -> Any:
    raise RuntimeError("no such kernel")


def result_of(name: str) -> self_test.Result:
    found = (result for result in self_test.results("cpu") if result.provider == name)
    return next(found)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("run", "wrong", "told"),
    [
        (by_reference, False, "right: error"),
        (wrong_sign, True, "WRONG: error"),
        (failing, True, "failed running: RuntimeError: no such kernel"),
    ],
)
def test_a_provider_is_tested_on_one_site(
    run: Any, wrong: bool, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with fxfuse.register_provider("mylib", run, ops=["norm_rope_store_"]):
        result = result_of("mylib")
    assert (result.wrong, result.op) == (wrong, "norm_rope_store_")
    assert told in result.told


@pytest.mark.cpu
def test_a_library_that_adds_nothing_up_is_tested_on_a_norm_alone() -> None:
    def declines(facts: providers.Facts) -> str | None:
        assert isinstance(facts.record, AddNorm)
        return "adds nothing up" if facts.record.addends > 1 else None

    def run(**call: Any) -> Any:
        return reference.add_rms_norm(**call)

    with fxfuse.register_provider("mylib", run, ops=["add_rms_norm"], declines=declines):
        result = result_of("mylib")
    assert not result.wrong and result.told.startswith("right: error")


@pytest.mark.null
def test_a_provider_that_declines_is_not_wrong() -> None:
    def declines(facts: providers.Facts) -> str:
        return "only on Sundays"

    with fxfuse.register_provider("mylib", by_reference, ops=["norm_rope"], declines=declines):
        result = result_of("mylib")
    assert not result.wrong and result.told == "not asked here: only on Sundays"


@pytest.mark.cpu
def test_the_command_tests_each_provider(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rotating = [p for p in providers.PROVIDERS if "norm_rope" in p.ops]
    monkeypatch.setattr(providers, "PROVIDERS", list(rotating))
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    triton, loops = capsys.readouterr().out.splitlines()[-2:]
    assert triton.endswith("not asked here: not for cpu") and "loops" in loops
    assert "right: error" in loops
    assert rotating == providers.PROVIDERS


@pytest.mark.null
def test_the_command_fails_where_a_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = self_test.Result("mylib", "norm_rope", True, "WRONG: error 1e+00")
    monkeypatch.setattr(self_test, "results", lambda device: iter([bad]))
    assert cli.main(["doctor", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "mylib" in out and "please report" in err
