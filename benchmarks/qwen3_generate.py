"""Qwen3-0.6B with random weights, static cache, 64 new tokens: stock Inductor beside fxfuse.

    python benchmarks/qwen3_generate.py [--out result.json] [--new-tokens 64]

Needs one CUDA GPU and no network. Every figure comes from a process of its own with an empty
Inductor cache. First correctness (float32 without TF32: greedy tokens equal eager's, 28 of 28
layers fused with their store), then kernels in a decode step, ms a token, compile seconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

import fxfuse

PROMPT, SLOTS, WARM_UP, TIMED = 16, 256, 4, 50
# Parts of kernel names, in lower case.
MATRIX_PRODUCT = ("gemm", "gemv", "cutlass", "splitk", "nvjet", "_mm_")
ATTENTION = ("flash", "fmha", "attention", "sdpa", "softmax")


def qwen3(dtype: torch.dtype) -> Qwen3ForCausalLM:
    """The shape of Qwen/Qwen3-0.6B."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config)
    return spread(model).to(dtype).eval()


@torch.no_grad()
def spread(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Layers with outputs of unit variance and scattered norm weights, in place.

    As initialised, tied embeddings outweigh the layers: the next token is the last one again,
    whatever attention does.
    """
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.add_(0.2 * torch.randn_like(weight))
        elif "embed" not in name:
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return model


class Decoder:
    """Greedy decoding by hand: an eager prompt, then one call of `model` for each token."""

    def __init__(self, eager: Any, model: Any) -> None:
        self.eager, self.model = eager, model
        self.cache = StaticCache(config=eager.config, max_cache_len=SLOTS)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")

    def start(self, prompt: torch.Tensor) -> None:
        self.cache.reset()
        logits = self.eager(prompt, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def step(self) -> None:
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1:].argmax(-1))

    def generate(self, prompt: torch.Tensor, count: int) -> list[int]:
        self.start(prompt)
        tokens = [self.token.item()]
        while len(tokens) < count:
            self.step()
            tokens.append(self.token.item())
        return [int(token) for token in tokens]


def fused_counts() -> dict[str, int]:
    counts = fxfuse.counts()
    return {"rotary": counts.get("attention", 0), "with_store": counts.get("store", 0)}


def compiled(eager: Any, how: str) -> Any:
    backend = {"inductor": "inductor", "fxfuse": fxfuse.backend}[how]
    return torch.compile(eager, backend=backend, mode="reduce-overhead")


def kernels_of_one_step(decoder: Decoder) -> list[str]:
    """Names of the CUDA kernels of one replayed step, in order of their start."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        decoder.model(decoder.token, past_key_values=decoder.cache, use_cache=True)
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    events = [event for event in trace.events() if event.device_type == device]
    events.sort(key=lambda event: event.time_range.start)
    return [event.name for event in events if not event.name.startswith(("Memcpy", "Memset"))]


def between_product_and_attention(kernels: list[str]) -> dict[str, int]:
    """Kernels that stand after a matrix product and directly before attention, with how often."""
    runs: list[str] = []
    found: Counter[str] = Counter()
    for name in kernels:
        low = name.lower()
        if any(word in low for word in ATTENTION):
            found.update(runs)
            runs = []
        elif any(word in low for word in MATRIX_PRODUCT):
            runs = []
        else:
            runs.append(name)
    return dict(found.most_common())


def milliseconds_a_token(decoder: Decoder) -> float:
    """Median of single steps between CUDA events; the cache keeps filling as in real decoding."""
    times = []
    for _ in range(TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        decoder.step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(how: str, new_tokens: int) -> dict[str, Any]:
    """bfloat16: sites, compile seconds, kernels, speed."""
    eager = qwen3(torch.bfloat16)
    prompt = torch.randint(0, eager.config.vocab_size, (1, PROMPT), device="cuda")
    decoder = Decoder(eager, compiled(eager, how))
    decoder.start(prompt)
    started = time.perf_counter()
    decoder.step()
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - started
    for _ in range(WARM_UP):
        decoder.step()
    kernels = kernels_of_one_step(decoder)
    decoder.start(prompt)
    result = {
        "compile_seconds": compile_seconds,
        "fused": fused_counts(),
        "milliseconds_a_token": milliseconds_a_token(decoder),
        "kernels": len(kernels),
        "between_projection_and_attention": between_product_and_attention(kernels),
        "kernels_by_name": dict(Counter(kernels).most_common()),
        "tokens": decoder.generate(prompt, new_tokens),
    }
    if how == "fxfuse":
        result["report"] = str(fxfuse.last_report())
    return result


def compare_tokens(new_tokens: int) -> dict[str, Any]:
    """float32, TF32 off: the greedy tokens of fxfuse and of eager."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    eager = qwen3(torch.float32)
    prompt = torch.randint(0, eager.config.vocab_size, (1, PROMPT), device="cuda")
    want = Decoder(eager, eager).generate(prompt, new_tokens)
    got = Decoder(eager, compiled(eager, "fxfuse")).generate(prompt, new_tokens)
    return {
        "tokens_equal": got == want,
        "count": len(got),
        "distinct": len(set(want)),
        "fused": fused_counts(),
    }


def in_a_process(what: str, new_tokens: int) -> Any:
    """The result of one measurement from a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--only", what, "--new-tokens", str(new_tokens)]
        command += ["--out", f"{cache}/result.json"]
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        subprocess.run(command, env=env, check=True)
        return json.loads(Path(f"{cache}/result.json").read_text())


def table(results: dict[str, Any]) -> str:
    """The results as text: correctness first."""
    exact, stock, fused = results["float32"], results["inductor"], results["fxfuse"]
    lines = [
        f"{results['device']}, torch {results['torch']}, transformers {results['transformers']},"
        f" {results['date']}",
        f"float32: {exact['count']} greedy tokens equal eager's: {exact['tokens_equal']}"
        f" ({exact['distinct']} distinct)",
        f"fused: {fused['fused']['rotary']} of 28 layers, {fused['fused']['with_store']} stored",
        "",
        f"{'bfloat16, reduce-overhead':36s}{'inductor':>12s}{'fxfuse':>12s}",
    ]
    rows = {
        "kernels in a decode step": ("kernels", "12d"),
        "milliseconds a token": ("milliseconds_a_token", "12.3f"),
        "compile seconds (decode graph)": ("compile_seconds", "12.1f"),
    }
    lines += [
        f"{label:36s}{format(stock[key], spec)}{format(fused[key], spec)}"
        for label, (key, spec) in rows.items()
    ]
    for how, result in (("inductor", stock), ("fxfuse", fused)):
        lines += ["", f"between projection and attention, {how}:"]
        lines += [
            f"{count:6d} x {name[:90]}"
            for name, count in result["between_projection_and_attention"].items()
        ]
    return "\n".join([*lines, "", fused["report"]])


def everything(new_tokens: int) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": " ".join(["python", *sys.argv]),
        "float32": in_a_process("float32", new_tokens),
        "inductor": in_a_process("inductor", new_tokens),
        "fxfuse": in_a_process("fxfuse", new_tokens),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--only", choices=["float32", "inductor", "fxfuse"])
    options = parser.parse_args()
    if options.only == "float32":
        results = compare_tokens(options.new_tokens)
    elif options.only:
        results = measure(options.only, options.new_tokens)
    else:
        results = everything(options.new_tokens)
        print(table(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
