"""generate(): the decode step is compiled by fxfuse, its KV-cache store is in the fused op.

    python examples/02_generate.py

A static cache keeps its memory, so the store joins norm and RoPE; CompileConfig hands the backend
to transformers, which compiles the step of one token and runs the prompt as it is.
"""

from __future__ import annotations

import sys
import time

import torch
from tour import qwen3, token_ids
from transformers import CompileConfig

import fxfuse

SETTINGS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@torch.no_grad()
def main() -> None:
    model, prompt = qwen3(), token_ids(1, 5)
    asked = SETTINGS | {"attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **asked)

    how = CompileConfig(backend=fxfuse.backend, mode=None, fullgraph=True, dynamic=False)
    how._compile_all_devices = True  # transformers leaves a CPU alone without this
    asked |= {"cache_implementation": "static", "compile_config": how}
    started = time.perf_counter()
    got = model.generate(prompt, **asked)
    print(f"compiled and generated in {time.perf_counter() - started:.1f} s")

    print(fxfuse.last_report())
    print(f"tokens: {got[0, prompt.shape[1] :].tolist()}")
    if not torch.equal(got, want):
        sys.exit(f"wrong: eager's tokens are {want[0, prompt.shape[1] :].tolist()}")
    print("equal: every token is eager's")


if __name__ == "__main__":
    main()
