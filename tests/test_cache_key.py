"""Inductor's caches know fxfuse's sources: after a change of them nothing stale is run.

A copy of the package trains one step in one process after another, all with one cache folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

TRAIN = """
import json
import torch
from torch import nn
from torch._dynamo.utils import counters
import fxfuse

torch.set_num_threads(1)
torch.manual_seed(0)

class Prelude(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))
        angles = torch.arange(3)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        half = torch.cat((-x[..., 2:], x[..., :2]), -1)
        return x * self.cos + half * self.sin

x = torch.randn(1, 2, 3, 4, requires_grad=True)
y = torch.compile(Prelude(), backend=fxfuse.backend)(x)
y.backward(torch.linspace(1, 2, 24).view(1, 2, 3, 4))
print(json.dumps({
    "package": fxfuse.__file__,
    "fused": len(fxfuse.last_report().fused),
    "y": y.flatten().tolist(),
    "gradient": x.grad.flatten().tolist(),
    "hits": counters["inductor"]["fxgraph_cache_hit"]
    + counters["aot_autograd"]["autograd_cache_hit"],
}))
"""

TWICE_THE_RESULT = """

_norm_rope = norm_rope


def norm_rope(*args):
    q, k = _norm_rope(*args)
    return 2 * q, k
"""

THREE_TIMES_THE_GRADIENT = """

_backward = backward


def backward(*args):
    q, *others = _backward(*args)
    return 3 * q, *others
"""


def train_in_a_process(folder: Path) -> Any:
    env = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", TRAIN], env=env, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fused"] == 1 and Path(result["package"]).is_relative_to(folder)
    return result


@pytest.mark.cpu
@pytest.mark.long
def test_a_change_of_the_sources_is_a_change_of_the_key(tmp_path: Path) -> None:
    package = tmp_path / "fxfuse"
    shutil.copytree(ROOT / "fxfuse", package, ignore=shutil.ignore_patterns("__pycache__"))
    changes = {"reference.py": TWICE_THE_RESULT, "gradients.py": THREE_TIMES_THE_GRADIENT}
    sources = {name: (package / name).read_text() for name in changes}

    first = train_in_a_process(tmp_path)
    assert first["hits"] == 0

    for name, change in changes.items():
        (package / name).write_text(sources[name] + change)
    changed = train_in_a_process(tmp_path)
    assert changed["y"] == pytest.approx([2 * y for y in first["y"]])
    assert changed["gradient"] == pytest.approx([3 * g for g in first["gradient"]])

    for name, source in sources.items():
        (package / name).write_text(source)
    again = train_in_a_process(tmp_path)
    assert again["hits"] > 0
    assert (again["y"], again["gradient"]) == (first["y"], first["gradient"])
