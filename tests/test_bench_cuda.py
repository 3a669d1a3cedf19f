"""fxfuse bench e2e on a GPU: each kernel of a decode step has its group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fxfuse import cli
from fxfuse.bench.groups import GROUPS

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
]
LAYERS = 4
# Embedding, positions, tables and mask before the layers, the next token behind them.
ONCE_A_STEP = 12


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Gemma3-12B", "Llama-3.1-8B"])
def test_kernels_of_a_step_have_groups(name: str, mode: str, batch: int, tmp_path: Path) -> None:
    target, kernels = tmp_path / "e2e.json", tmp_path / "kernels.tsv"
    asked = ["--models", name, "--layers", str(LAYERS), "--batch", str(batch), "--mode", mode]
    asked += ["--phases", "decode", "--opponents", "inductor", "fxfuse", "--rounds", "10"]
    asked += ["--json", str(target), "--kernels", str(kernels)]
    assert cli.main(["bench", "e2e", *asked]) == 0
    for row in json.loads(target.read_text())["rows"]:
        groups = row["groups"]
        assert set(groups) == set(GROUPS) and row["step_bytes"] is not None
        assert sum(group["kernels"] for group in groups.values()) == row["kernels"]
        few = {g for g in GROUPS if groups[g]["kernels"] < (1 if g == "head" else LAYERS)}
        assert few <= {"other"}, kernels.read_text()
        assert groups["other"]["kernels"] <= ONCE_A_STEP, kernels.read_text()
