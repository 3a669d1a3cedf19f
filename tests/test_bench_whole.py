"""fxfuse bench e2e: whole models, from the command to its JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxfuse import cli
from fxfuse.bench import generation, models, timing, whole, whole_command
from fxfuse.bench.groups import GROUPS, Kernel
from fxfuse.bench.whole import Whole

pytest.importorskip("transformers")
SLOTS, NEW = 256, 4
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> models.Model:
    model = models.MODELS["Qwen3-0.6B"]
    made = dataclasses.replace(model, numbers={**model.numbers, **SMALL})
    monkeypatch.setitem(models.MODELS, model.name, made)
    monkeypatch.setattr(timing, "copy_bytes_per_us", lambda _: 1e4)
    return made


def asked(*more: str) -> list[str]:
    shared = ["--models", "Qwen3-0.6B", "--layers", "2", "--batch", "2", "--device", "cpu"]
    sizes = ["--rounds", "2", "--slots", str(SLOTS), "--new-tokens", str(NEW), "--prefill", "8"]
    return ["bench", "e2e", *shared, *sizes, *more]


@pytest.mark.cpu
@pytest.mark.long
def test_phases_are_checked_and_timed(small: models.Model, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "e2e.json"
    chosen = ["--phases", "decode", "generate", "--opponents", "inductor", "fxfuse"]
    assert cli.main(asked(*chosen, "--json", str(target))) == 0
    found = json.loads(target.read_text())
    rows = {(row["phase"], row["backend"]): row for row in found["rows"]}
    assert set(rows) == {(p, b) for p in ("decode", "generate") for b in ("inductor", "fxfuse")}
    assert (found["mode"], found["slots"]) == ("reduce-overhead", SLOTS)
    for (_, backend), row in rows.items():
        assert row["wrong"] is None and row["sites"] == (2 if backend == "fxfuse" else 0), row
        assert row["tokens_per_s"] == 1e3 * row["batch"] / row["ms"]["median"]
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.cpu
def test_a_shard_is_compiled_and_not_timed(small: models.Model, capsys: Any) -> None:
    only = ["--opponents", "inductor", "fxfuse", "--phases", generation.KEPT, "--compile-only"]
    assert cli.main(asked(*only, "--mode", "max-autotune", "--shard", "1/2")) == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert "backend=fxfuse" in line and "compile s=" in line and "  ms=" not in line


@pytest.mark.null
@torch.no_grad()
@pytest.mark.parametrize("kept", [False, True])
def test_generate_is_greedy_decoding_over_the_slots_asked_for(
    small: models.Model, kept: bool
) -> None:
    decoder = whole.Decoder(models.made(small, "cpu", 2), 2, SLOTS, "cpu")
    prompt = decoder.prompt(whole.PROMPT)
    cache = decoder.cache if kept else None
    call = generation.Call(decoder.eager, prompt, NEW, SLOTS, cache)
    decoder.start()
    wanted = decoder.logits(decoder.eager, decoder.token)[:, 0].float()
    decoder.cache.reset()
    torch.testing.assert_close(call.second_logits(call.eager), wanted, rtol=0, atol=0)
    decoder.cache.reset()
    assert call.eager().shape == (2, whole.PROMPT + NEW)


@pytest.mark.null
@torch.no_grad()
def test_a_cache_of_another_size_is_an_error(small: models.Model) -> None:
    decoder = whole.Decoder(models.made(small, "cpu", 2), 2, SLOTS, "cpu")
    call = generation.Call(decoder.eager, decoder.prompt(8), NEW, SLOTS + 1, decoder.cache)
    with pytest.raises(ValueError, match=f"{SLOTS} slots; wanted {NEW}, {SLOTS + 1}"):
        call.second_logits(call.eager)


@pytest.mark.null
def test_a_model_without_generate_has_no_such_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(num_hidden_layers=1)
    monkeypatch.setattr(models, "made", lambda *_: SimpleNamespace(config=config))
    monkeypatch.setattr(whole, "Decoder", lambda *_: SimpleNamespace(start=lambda: None))
    args = SimpleNamespace(layers=None, slots=SLOTS, phases=generation.PHASES)
    rows: list[Whole] = []
    whole.measure(models.MODELS["Qwen3-VL-8B"], {1: ["inductor"]}, args, "cpu", rows.append)
    assert rows == []


@pytest.mark.null
def test_a_prompt_is_traced_in_a_cache_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []

    def kernels(step: Any) -> list[Kernel]:
        step()
        assert len(prompts) == 1, "the cache is full"
        return [Kernel("prompt", 1.0)]

    monkeypatch.setattr(whole, "_kernels", kernels)
    row = Whole("M", "prefill", 1, "fxfuse", 1)
    whole._trace(row, lambda: prompts.append("prompt"), prompts.clear)
    assert row.kernels == 1


@pytest.mark.null
def test_a_prompt_makes_no_tokens() -> None:
    ms = timing.Spread(4.0, 4.0, 4.0)
    told = {
        phase: Whole("M", phase, 8, "fxfuse", 2, ms=ms).tokens_per_s() for phase in whole.PHASES
    }
    assert told.pop("prefill") is None and set(told.values()) == {2000.0}
    assert Whole("Flux", "denoise", 8, "fxfuse", 2, ms=ms).tokens_per_s() is None


@pytest.mark.null
def test_groups_are_told_in_the_table_and_in_order() -> None:
    row = Whole("M", "decode", 1, "fxfuse", 2, traced=[Kernel("a", 1.5), Kernel("fmha", 2.0)])
    row.groups = whole.groups.totals(row.traced, row.layers)
    cells = whole_command._grouped(row)
    assert list(cells)[3:] == [*GROUPS, "all"]
    assert (cells["attention"], cells["other"], cells["all"]) == ("2.0 (1)", "1.5 (1)", "3.5 (2)")
    assert whole_command._in_order(row).splitlines()[1:] == [
        "other\t1.50\ta",
        "attention\t2.00\tfmha",
    ]


@pytest.mark.null
@pytest.mark.parametrize("more", [["--new-tokens", "1"], ["--new-tokens", str(SLOTS)]])
def test_calls_must_decode_and_fit(more: list[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(asked(*more))
