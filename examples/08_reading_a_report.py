"""A report: what was fused and into which op, what was not and why, what to do about it.

    python examples/08_reading_a_report.py

`compiler="eager"` reads and fuses as ever and compiles nothing: seconds, where Inductor takes
minutes. `fxfuse explain MODEL_OR_SCRIPT` prints the same.
"""

from __future__ import annotations

import json
import sys

import torch
from tour import compare, qwen3, token_ids
from transformers import DynamicCache

import fxfuse


@torch.no_grad()
def main() -> None:
    model, ids, cache = qwen3(layers=2), token_ids(1, 7), DynamicCache()
    model(ids, past_key_values=cache)
    # This cache grows by torch.cat, so there is no memory that a fused op could store to.
    report = fxfuse.explain(model, ids[:, :1], past_key_values=cache, compiler="eager")
    print(f"{report}\n")

    site = report.fused[0]
    norm, rotation = site.record.q.norm, site.record.q.rotation
    print(f"the first site: {' + '.join(site.stages)}, at {site.where}")
    print(f"  norm {norm.kind} over the {norm.over}, {rotation.pairs} pairs, eps {site.eps[0]}")
    print(f"  {site.op} by {site.provider}")

    refusal = report.refused[0]
    print(f"the first refusal: {refusal.reason}")
    print(f"  wanted {refusal.wanted}\n  to do  {refusal.do}\n  at     {refusal.where}")
    print(f"left to Inductor: {sorted({left.kind for left in report.left})}")
    print(f"as JSON: {len(json.loads(report.to_json())['fused'])} fused")

    # A test of a model: a rotation that is not fused is an error.
    strict = torch.compile(model, backend=fxfuse.Backend(strict=True, compiler="eager"))
    compare("logits", strict(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    with fxfuse.disabled():
        off = fxfuse.explain(model, ids, use_cache=False, compiler="eager")
    print(f"inside fxfuse.disabled(): {len(off.fused)} fused, {off.notes[0]}")
    if len(report.fused) < 2 or off.fused:
        sys.exit("wrong: two layers were expected, and none inside disabled()")


if __name__ == "__main__":
    main()
