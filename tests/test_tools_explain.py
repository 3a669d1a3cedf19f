"""`fxfuse explain`: a model found offline, a script run through fxfuse, and what it says if not."""

from __future__ import annotations

import argparse
import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import fxfuse
from fxfuse import cli
from fxfuse.report import collected
from fxfuse.tiny.inputs import PROMPT
from fxfuse.tools import models
from tests.models.families import SMALL
from tests.toys import Attention, hidden_states

pytestmark = pytest.mark.null

SCRIPT = """
import sys
import fxfuse
import torch
from tests.toys import Attention, hidden_states

toy, x = Attention(), hidden_states()
wanted = toy(x)

@torch.compile{options}
def run(x):
    return toy(x)

assert torch.allclose(run(x), wanted, atol=1e-5)
print("ran with", *sys.argv[1:], __name__)
"""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def explained(*words: str | Path) -> int:
    return cli.main(["explain", *map(str, words)])


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    """What `--json` says."""
    assert explained(*words, "--json", "--device", "cpu") == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def stages(data: dict[str, Any]) -> list[str]:
    return [" + ".join(site["stages"]) for site in data["fused"]]


# --- models ------------------------------------------------------------------------------------


def test_a_class_is_built_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    data = told(capsys, "Qwen3")
    assert not counters["inductor"] and not counters["aot_autograd"]
    assert stages(data) == ["rms_norm + rope + store(k,v)"] * 2 + ["grouped_heads"] * 2
    assert data["what"] == (
        "Qwen3ForCausalLM, tiny, random weights, 2 layers, float32, cpu, "
        "static cache of 33 slots, 1 token"
    )
    assert [site["provider"] for site in data["fused"]] == ["loops"] * 2 + ["torch"] * 2
    assert "compile" not in data["milliseconds"]


@pytest.mark.parametrize(
    ("word", "unit", "model"),
    [
        ("qwen3", "qwen3", "Qwen3ForCausalLM"),
        ("Qwen3ForCausalLM", "qwen3", "Qwen3ForCausalLM"),
        ("Qwen3Config", "qwen3", "Qwen3ForCausalLM"),
        ("Qwen3Model", "qwen3", "Qwen3Model"),
        ("qwen3.sliding", "qwen3.sliding", "Qwen3ForCausalLM"),
        ("Gemma3", "gemma3", "Gemma3ForCausalLM"),
    ],
)
def test_a_model_has_several_names(word: str, unit: str, model: str) -> None:
    found = models.unit_of(word)
    assert found is not None and (found.name, found.model) == (unit, model)


def given(*words: str) -> models.Given:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    models.add_arguments(parser)
    return models.given(parser.parse_args([*words, "--device", "cpu"]))


def test_a_call_is_as_asked_for() -> None:
    qwen3 = given("qwen3")
    arguments, call = qwen3.call("none", None)
    assert call == "no cache, 16 tokens"
    assert (arguments["input_ids"].shape[1], arguments["use_cache"]) == (16, False)
    arguments, call = qwen3.call("dynamic", 3)
    assert call == "dynamic cache, 3 tokens" and arguments["input_ids"].shape[1] == 3
    assert type(arguments["past_key_values"]) is transformers.DynamicCache
    assert arguments["past_key_values"].get_seq_length() == PROMPT


def test_a_tower_is_called_with_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    data = told(capsys, "dinov3_vit")
    assert data["what"].endswith("cpu, no cache") and stages(data) == ["rope"] * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config of three layers as it lies in the hub, without weights."""
    config = transformers.Qwen3Config(
        **{**SMALL, "num_hidden_layers": 3}, architectures=["Qwen3ForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_a_config_is_built_as_large_as_it_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = given(str(folder), "--random-weights")
    assert whole.name == "Qwen3ForCausalLM, 3 layers, float32, cpu"
    cut = told(capsys, folder / "config.json", "--random-weights", "--layers", "1")
    assert [site["kind"] for site in cut["fused"]] == ["attention", "grouped_heads"]
    assert "Qwen3ForCausalLM, 1 layer," in cut["what"]


def test_weights_are_loaded_where_they_are(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    saved = transformers.Qwen3ForCausalLM(config)
    saved.save_pretrained(folder)
    assert torch.equal(given(str(folder)).model.lm_head.weight, saved.lm_head.weight)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["Qwen33"], "no model 'Qwen33' (near it: Qwen"),
        (["owner/nothing-here"], "no config in owner/nothing-here"),
        (["nothing.py"], "no script nothing.py"),
        (["dinov3_vit", "--cache", "static"], "takes no cache; use --cache none"),
        (["Qwen3", "--", "--prompt"], "arguments --prompt are for scripts only"),
    ],
)
def test_what_cannot_be_is_said_once(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explained(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fxfuse explain: ") and reason in err
    assert err.count("\n") == 1


def test_a_config_without_weights_says_how_to_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explained(folder) == 2
    assert "--random-weights builds the config without them" in capsys.readouterr().err


def test_without_transformers_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert explained("Qwen3") == 2
    assert "pip install transformers" in capsys.readouterr().err


# --- scripts -----------------------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "generate.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "options",
    ["", '(backend="inductor")', "(dynamic=True)", '(backend=fxfuse.Backend(compiler="eager"))'],
)
def test_a_script_runs_through_fxfuse(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, original = written(tmp_path, SCRIPT.format(options=options)), torch.compile
    assert explained(path, "--json", "--compiler", "eager", "--", "a", "--b") == 0
    out, err = capsys.readouterr()
    assert "ran with a --b __main__" in err, "the script's own output is beside the JSON"
    assert stages(json.loads(out)) == ["rope"]
    assert torch.compile is original


def test_another_backend_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, SCRIPT.format(options='(backend="eager")'))
    assert explained(path) == 1
    assert "compiled nothing by Inductor or fxfuse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [
        ("raise ValueError('of the script')", 1, "ValueError: of the script"),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no more')", 1, "no more"),
    ],
)
def test_a_script_that_ends_early_is_reported_too(
    last: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, SCRIPT.format(options="") + last)
    assert explained(path, "--compiler", "eager") == status
    out, err = capsys.readouterr()
    assert "1 × rope" in out and "spellings.py:" in out and said in err
    assert "runpy" not in err


def test_what_other_threads_compile_is_collected(tmp_path: Path) -> None:
    def work() -> None:
        with torch.no_grad():
            torch.compile(Attention(), backend=fxfuse.Backend(compiler="eager"))(hidden_states())

    with collected() as report:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert (report.graphs, len(report.fused)) == (1, 1)
