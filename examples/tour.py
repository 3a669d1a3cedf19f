"""What the numbered programs share: a tiny Qwen3 with random weights; the comparison with eager."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def qwen3(layers: int = 1, device: str = DEVICE) -> Any:
    """Weights are larger than those of a new model: else attention is uniform, and hides errors."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).eval().to(device)


def token_ids(*shape: int, seed: int = 1, device: str = DEVICE) -> Tensor:
    return torch.randint(3, 160, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def compare(what: str, got: Tensor, want: Tensor, most: float = 1e-4) -> None:
    """Print |got - want| / |want|; more than `most` ends the program. Sums in float32 of two orders
    differ near 1e-6, a wrong sign makes 1e-2.
    """
    error = float((got - want).double().norm() / want.double().norm())
    print(f"equal: {what}, error {error:.1e} of eager's")
    if not error <= most:
        sys.exit(f"wrong: {what}, at most {most:.0e} was expected")
