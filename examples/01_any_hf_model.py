"""Any rotary model of transformers: compile it with fxfuse, and read what was fused.

    python examples/01_any_hf_model.py [gemma3 qwen3_vl.text gpt_neox ...]

A tiny one with random weights is built here; a checkpoint's model is compiled by the same line. No
model is known by name: fxfuse reads the graph.
"""

from __future__ import annotations

import sys

import torch
from tour import DEVICE, compare

import fxfuse
from fxfuse.tiny.inputs import inputs_of
from fxfuse.tiny.model import tiny_model
from fxfuse.tiny.units import units_of


@torch.no_grad()
def main(names: list[str]) -> None:
    for name in names:
        units = units_of(name.partition(".")[0])
        if name not in units:
            sys.exit(f"no model {name}, there is {', '.join(units) or 'no such folder'}")
        model = tiny_model(units[name]).eval()
        inputs = {key: x.to(DEVICE) for key, x in inputs_of(name, model).items()}
        model.to(DEVICE)

        compiled = torch.compile(model, backend=fxfuse.backend)
        got = compiled(**inputs, use_cache=False)[0]

        print(f"{name}\n{fxfuse.last_report()}")
        compare("logits", got, model(**inputs, use_cache=False)[0])


if __name__ == "__main__":
    main(sys.argv[1:] or ["gemma3"])
