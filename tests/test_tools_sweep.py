"""`fxfuse sweep`: which units a word means, what it writes, and its exit status."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fxfuse import cli
from fxfuse.sweep import run
from fxfuse.sweep.measure import Plan
from fxfuse.sweep.results import Run, UnitResult, load

pytestmark = pytest.mark.null


@pytest.mark.parametrize(
    ("models", "units"),
    [
        ("qwen3", ["qwen3", "qwen3.sliding"]),
        ("=qwen3", ["qwen3"]),
        ("qwen3_vl.text,=llama,qwen3_vl.text", ["qwen3_vl.text", "llama"]),
        ("qwen3_vl.full", ["qwen3_vl.full"]),
    ],
)
def test_what_a_word_means(
    models: str, units: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep", "--list", "--models", models]) == 0
    assert capsys.readouterr().out.split() == units


def test_a_model_that_is_none_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sweep", "--models", "qwen33"]) == 2
    told = capsys.readouterr().err
    assert "no rotary model 'qwen33' (near it: qwen3" in told and "--list" in told


def test_a_library_that_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert cli.main(["sweep", "--library", "all", "--list"]) == 2
    assert "diffusers is not installed: pip install diffusers" in capsys.readouterr().err


def test_a_model_is_run_told_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "sweep.json", tmp_path / "coverage.md"
    words = ["sweep", "--models", "=llama", "--scenario", "static_decode", "--out", str(out)]
    assert cli.main([*words, "--document", str(page)]) == 0
    assert "static_decode  float32  ok    fused 2/2  stored 2" in capsys.readouterr().out
    assert load(out).units["llama"].rotates
    assert "| llama | 2 | rope + store(k,v) | 2 of 2 |" in page.read_text()
    assert cli.main(words) == 0
    assert "[1/1" not in capsys.readouterr().out


def test_a_wrong_result_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(unit: str, _: Plan) -> UnitResult:
        return UnitResult(unit, runs=[Run("no_cache", "float32", "wrong", worst="output.logits")])

    monkeypatch.setattr(run, "measure", measure)
    assert cli.main(["sweep", "--models", "=llama"]) == 1
    assert "wrong: llama no_cache float32: output.logits" in capsys.readouterr().out
