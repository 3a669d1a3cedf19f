"""What fxfuse's own passes cost for each further layer of a kind already seen.

    python benchmarks/pass_cost.py

Compiles Qwen3 with a static cache, one token, at several depths with compiler="eager", and prints
the best of three for lens + read + plan (decoding and proofs are in plan), with the slope.
"""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

import fxfuse

DEPTHS = (2, 4, 28, 80)
TIMES = 3


def milliseconds(layers: int) -> float:
    config = Qwen3Config(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    model, ids = Qwen3ForCausalLM(config).eval(), torch.zeros(2, 1, dtype=torch.long)
    cache = StaticCache(config=config, max_cache_len=32)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        torch._dynamo.reset()
        torch.compile(model, backend=fxfuse.Backend(compiler="eager"))(ids, past_key_values=cache)
    report = fxfuse.last_report()
    assert report is not None and len(report.fused) == layers
    return sum(report.milliseconds[stage] for stage in ("lens", "read", "plan"))


def main() -> None:
    milliseconds(2)
    before = None
    for layers in DEPTHS:
        best = min(milliseconds(layers) for _ in range(TIMES))
        slope = (
            "" if before is None else f", {(best - before[1]) / (layers - before[0]):.0f} a layer"
        )
        print(f"{layers:3d} layers: {best:.0f} ms{slope}", flush=True)
        before = layers, best


if __name__ == "__main__":
    main()
