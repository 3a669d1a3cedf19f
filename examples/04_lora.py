"""LoRA by PEFT: the adapter stays outside of the fused op, which reads what it adds up to.

    python examples/04_lora.py

The same compiled model runs with the adapter, with it merged into the weights, and without it.
"""

from __future__ import annotations

import importlib.util

import torch
from tour import compare, qwen3, token_ids

import fxfuse


@torch.no_grad()
def main() -> None:
    if importlib.util.find_spec("peft") is None:
        print("left out: peft is not installed, pip install peft")
        return
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(qwen3(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zeros, until it is trained
            weight.normal_(std=0.2)
    model.eval()
    ids = token_ids(1, 7)
    compiled = torch.compile(model, backend=fxfuse.backend)

    def run(what: str) -> None:
        compare(what, compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)

    run("with the adapter")
    print(fxfuse.last_report())
    model.merge_adapter()
    run("merged")
    model.unmerge_adapter()
    with model.disable_adapter():
        run("without the adapter")


if __name__ == "__main__":
    main()
