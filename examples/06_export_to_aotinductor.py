"""torch.export, fxfuse.fuse, AOTInductor: a package with the kernels inside, for a CPU.

    python examples/06_export_to_aotinductor.py

Another process, into which fxfuse is not imported, loads the package and runs it for two lengths.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tour import compare, qwen3, token_ids

import fxfuse

ELSEWHERE = """
import sys, torch
run = torch._inductor.aoti_load_package("model.pt2")
torch.save([run(ids) for ids in torch.load("inputs")], "results")
assert "fxfuse" not in sys.modules
"""


class Logits(nn.Module):
    """The model as a function of token ids alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


@torch.no_grad()
def main(folder: Path) -> None:
    model = Logits(qwen3(device="cpu"))
    inputs = [token_ids(1, tokens, device="cpu") for tokens in (7, 11)]
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(model, (inputs[0],), dynamic_shapes=({1: tokens},))
    program = fxfuse.fuse(program)
    print(fxfuse.last_report())
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    torch.save(inputs, folder / "inputs")
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=folder, check=True)
    for ids, got in zip(inputs, torch.load(folder / "results"), strict=True):
        compare(f"{ids.shape[1]} tokens by the package", got, model(ids))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
