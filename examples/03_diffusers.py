"""A transformer of diffusers: each kind of block is compiled once and serves all its layers.

    python examples/03_diffusers.py

compile_repeated_blocks passes its keywords to torch.compile, so fxfuse's backend is one of them. Of
a pipeline it is `pipe.transformer.compile_repeated_blocks(backend=fxfuse.backend, fullgraph=True)`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from tour import DEVICE, compare

import fxfuse


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).to(DEVICE)


@torch.no_grad()
def main() -> None:
    if importlib.util.find_spec("diffusers") is None:
        print("left out: diffusers is not installed, pip install diffusers")
        return
    image, text = 16, 8
    inputs = {
        "hidden_states": torch.randn(1, image, 4),
        "encoder_hidden_states": torch.randn(1, text, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(3 * image).reshape(image, 3).float(),
        "txt_ids": torch.zeros(text, 3),
    }
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    model = flux().eval()
    want = model(**inputs, return_dict=False)[0]
    model.compile_repeated_blocks(backend=fxfuse.backend, fullgraph=True)
    got = model(**inputs, return_dict=False)[0]
    print(f"sites by kind: {fxfuse.counts()}\n{fxfuse.last_report()}")
    compare("one denoising step", got, want)


if __name__ == "__main__":
    main()
