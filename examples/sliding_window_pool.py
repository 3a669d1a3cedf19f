"""RoPE and the KV-cache store of a model with full and sliding-window layers.

    python examples/sliding_window_pool.py [--device cpu|cuda] [--tokens N] [--dtype D]

As a serving engine's native path writes it (gpt-oss in SGLang): the scheduler hands out slots of
the full layers' pool. The sliding layers' pool is smaller, and `full_to_swa` [S] says which of its
slots holds a token. A pool is one buffer [S, G, D] for each of its layers, all at the same slots.

    k_buffer[slots] = k                 in a full layer
    k_buffer[full_to_swa[slots]] = k    in a sliding one
"""

from __future__ import annotations

import torch
from showing import Chain, main
from torch import Tensor, nn

H, G, D, P = 8, 2, 64, 4096
FULL, WINDOW = 1024, 512
LAYERS = ("full", "sliding", "full", "sliding")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] by cos and sin [T, 1, D / 2], in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)


class Layers(nn.Module):
    """q [T, H, D] of each layer, as attention reads it; k and v go to the buffers. In attention's
    place q itself is the next layer's input.
    """

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        frequency = 1e4 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
        angle = torch.arange(P)[:, None] * frequency
        self.register_buffer("table", torch.cat((angle.cos(), angle.sin()), -1).float())
        sizes, seeded = (len(LAYERS), (H + 2 * G) * D, H * D), torch.Generator().manual_seed(1)
        self.qkv_proj = nn.Parameter(torch.randn(sizes, generator=seeded) * (H * D) ** -0.5)

    def forward(
        self, x: Tensor, positions: Tensor, slots: Tensor, full_to_swa: Tensor, *buffers: Tensor
    ) -> list[Tensor]:
        cos, sin = self.table[positions].unsqueeze(-2).chunk(2, dim=-1)
        locations = {"full": slots, "sliding": full_to_swa[slots]}
        attended = []
        for layer, kind in enumerate(LAYERS):
            qkv = nn.functional.linear(x, self.qkv_proj[layer])
            q, k, v = qkv.unflatten(-1, (-1, D)).split((H, G, G), dim=-2)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            k_buffer, v_buffer = buffers[2 * layer : 2 * layer + 2]
            k_buffer[locations[kind]] = k
            v_buffer[locations[kind]] = v
            attended.append(q)
            x = q.flatten(-2)
        return attended


def inputs(device: str, dtype: torch.dtype, tokens: int) -> tuple[Tensor, ...]:
    """The first layer's input [T, H D], slots in no order, buffers k and v of each layer."""
    generator = torch.Generator().manual_seed(0)
    full, window = max(FULL, 2 * tokens), max(WINDOW, tokens + 8)
    hidden = torch.randn(tokens, H * D, generator=generator)
    positions = torch.randint(P, (tokens,), generator=generator)
    slots = torch.randperm(full, generator=generator)[:tokens]
    full_to_swa = torch.full((full,), -1)
    full_to_swa[slots] = torch.randperm(window, generator=generator)[:tokens]
    sizes = [full if kind == "full" else window for kind in LAYERS for _ in "kv"]
    buffers = [torch.randn(size, G, D, generator=generator).to(dtype) for size in sizes]
    given = (hidden.to(dtype), positions, slots, full_to_swa, *buffers)
    return tuple(x.to(device) for x in given)


CHAIN = Chain(
    "sliding-window pools", Layers(), inputs, written=tuple(range(4, 4 + 2 * len(LAYERS)))
)

if __name__ == "__main__":
    raise SystemExit(main(CHAIN))
