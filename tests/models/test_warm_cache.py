"""A second process finds Inductor's cache warm: the same report, nothing generated again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import json
import torch
from torch._dynamo.utils import counters
import fxfuse
from tests.models.families import FAMILIES
from tests.models.tiny import build, token_ids

torch.set_num_threads(1)
with torch.no_grad():
    model = torch.compile(build(FAMILIES["llama"], num_hidden_layers=1), backend=fxfuse.backend)
    logits = model(token_ids(7), use_cache=False).logits
report = fxfuse.last_report().to_json(timings=False)
hits = counters["inductor"]["fxgraph_cache_hit"]
hits += counters["aot_autograd"]["autograd_cache_hit"]
print(json.dumps({
    "report": json.loads(report),
    "logits": logits.double().sum().item(),
    "hits": hits,
}))
"""


def compile_in_a_process(cache: Path) -> Any:
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, cwd=cache, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.cpu
@pytest.mark.long
def test_a_warm_cache_gives_the_same_report(tmp_path: Path) -> None:
    cold, warm = compile_in_a_process(tmp_path), compile_in_a_process(tmp_path)
    assert cold["hits"] == 0 and warm["hits"] > 0
    ops = ["fxfuse::norm_rope", "scaled_dot_product_attention(enable_gqa)"]
    assert [fused["op"] for fused in cold["report"]["fused"]] == ops
    assert warm["report"] == cold["report"]
    assert warm["logits"] == cold["logits"]
