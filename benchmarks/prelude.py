"""The attention prelude on one GPU: stock Inductor, combo kernels, and the op of fxfuse.

    python benchmarks/prelude.py [--json prelude.json] [--tokens 1 16 256 4096]

Correctness against float64 comes first, and nothing wrong is timed. Times are µs of one call in a
CUDA graph over rotating buffers; from 256 tokens on these are together larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fxfuse.ops  # noqa: F401
from fxfuse import reference
from fxfuse.lowering import providers
from fxfuse.patterns.record import Norm, Pair, Pass, Record, Rotation, Store, Stream

EPS = 1e-6
MODELS = {"Qwen3-0.6B": (16, 8, 128), "Qwen3-8B": (32, 8, 128)}


@dataclasses.dataclass
class Buffers:
    """What one call reads and writes; q, k, v are projections [1, T, heads * D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    k_cache: Tensor
    v_cache: Tensor

    def values(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def drawn(heads: int, kv_heads: int, d: int, tokens: int, seed: int) -> Buffers:
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    angle = torch.randn(1, tokens, d // 2, generator=generator, device="cuda").repeat(1, 1, 2)
    cache = (1, kv_heads, max(tokens, 1024), d)
    start = cache[2] - tokens
    return Buffers(
        draw(1, tokens, heads * d),
        draw(1, tokens, kv_heads * d),
        draw(1, tokens, kv_heads * d),
        draw(d),
        draw(d),
        angle.cos().bfloat16(),
        angle.sin().bfloat16(),
        torch.arange(start, start + tokens, device="cuda"),
        torch.zeros(cache, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(cache, dtype=torch.bfloat16, device="cuda"),
    )


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def chain(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
    sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """The prelude as transformers writes it for Qwen3 with a static cache."""
    d = q_weight.shape[0]
    q = rms_norm(q.unflatten(-1, (-1, d)), q_weight).transpose(1, 2)
    k = rms_norm(k.unflatten(-1, (-1, d)), k_weight).transpose(1, 2)
    v = v.unflatten(-1, (-1, d)).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q = q * cos + rotate_half(q) * sin
    k = k * cos + rotate_half(k) * sin
    k_cache.index_copy_(2, slots, k)
    v_cache.index_copy_(2, slots, v)
    return q


def record(d: int, dtype: str = "bfloat16") -> Record:
    pair, norm = Pair(0, d // 2, 1), Norm("head", "before", True)
    turn = Rotation(d // 2, pair, pair, pair, pair, (-1, 1))
    q = Stream(d, norm, turn, (), dtype=dtype, heads_first=True)
    v = Stream(d, None, None, (Pass(0, 0, d),), dtype=dtype, keep=False)
    return Record(q, dataclasses.replace(q, keep=False), v, Store(heads_first=True))


def fused(text: str) -> Callable[..., Tensor]:
    """The same as `chain`, by the op that fxfuse puts into a graph."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
        sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
    ) -> Tensor:  # fmt: skip
        d = q_weight.shape[0]
        q, k, v = (x.unflatten(-1, (-1, d)) for x in (q, k, v))
        q_out, _ = torch.ops.fxfuse.norm_rope_store_(
            q, k, v, q_weight, k_weight, None, None, cos, sin, slots, k_cache, v_cache,
            EPS, EPS, text,
        )  # fmt: skip
        return q_out.transpose(1, 2)

    return run


def exact(b: Buffers) -> tuple[Tensor, Tensor]:
    """q and the K cache in float64."""
    d = b.q_weight.shape[0]
    wide = Buffers(*[x.double() if x.is_floating_point() else x for x in b.values()])
    q, k, v = (x.unflatten(-1, (-1, d)) for x in (wide.q, wide.k, wide.v))
    out, _ = reference.norm_rope_store_(
        q, k, v, wide.q_weight, wide.k_weight, None, None, wide.cos, wide.sin, wide.slots,
        wide.k_cache, wide.v_cache, EPS, EPS, record(d, "float64"),
    )  # fmt: skip
    return out.transpose(1, 2), wide.k_cache


def error(run: Callable[..., Tensor], b: Buffers, want: tuple[Tensor, Tensor]) -> float:
    """The larger relative rms error of q and of the K cache."""
    b.k_cache.zero_()
    got = (run(*b.values()), b.k_cache)
    return max(
        float((g.double() - w).square().mean().sqrt() / w.square().mean().sqrt())
        for g, w in zip(got, want, strict=True)
    )


def measure_us(run: Callable[..., Tensor], sets: list[Buffers]) -> float:
    """µs of one call: the least of ten replays of a graph that goes round all buffers."""
    calls = max(len(sets), 32) // len(sets) * len(sets)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for b in sets:
            run(*b.values())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        # Held, so that the graph's allocator cannot give every call the same output.
        held = [run(*sets[i % len(sets)].values()) for i in range(calls)]
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    del held
    return min(times[2:])


def copy_bytes_per_us() -> float:
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y, best = torch.empty_like(x), float("inf")
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y.copy_(x)
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3)
    return 2 * x.numel() / best


def row(model: str, tokens: int, copy_speed: float) -> dict[str, float | str | int]:
    """One line of the table: errors, then times, then how near to a copy."""
    heads, kv_heads, d = MODELS[model]
    moved_bytes = 2 * 2 * tokens * d * (heads + 2 * kv_heads) + 2 * 2 * tokens * d
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    count = 8 if tokens < 256 else min(256, -(-2 * l2_bytes // moved_bytes) + 1)
    sets = [drawn(heads, kv_heads, d, tokens, seed) for seed in range(count)]
    torch._dynamo.reset()
    runs = {
        "stock": torch.compile(chain, dynamic=False),
        "combo": torch.compile(chain, dynamic=False, options={"combo_kernels": True}),
        "fxfuse": torch.compile(fused(record(d).to_text()), dynamic=False),
    }
    want = exact(sets[0])
    errors = {name: error(run, sets[0], want) for name, run in runs.items()}
    line: dict[str, float | str | int] = {"model": model, "tokens": tokens, "buffers": count}
    line |= {f"{name}_error": e for name, e in errors.items()}
    if not errors["fxfuse"] <= 1.05 * errors["stock"]:
        return line | {"wrong": "fxfuse's error exceeds stock's"}
    times = {name: measure_us(run, sets) for name, run in runs.items()}
    best = min(times["stock"], times["combo"])
    line |= {f"{name}_us": t for name, t in times.items()}
    return line | {
        "against_stock": times["stock"] / times["fxfuse"],
        "against_best": best / times["fxfuse"],
        "of_copy": moved_bytes / times["fxfuse"] / copy_speed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("prelude.json"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/prelude.py needs a CUDA or ROCm GPU")
    providers.register()
    copy_speed = copy_bytes_per_us()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, copy {copy_speed / 1e6:.2f} TB/s")
    lines = []
    with torch.no_grad():
        for model in MODELS:
            for tokens in args.tokens:
                lines.append(row(model, tokens, copy_speed))
                print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                                for k, v in lines[-1].items()), flush=True)  # fmt: skip
    result = {"device": device, "torch": torch.__version__, "rows": lines}
    result["copy_bytes_per_us"] = copy_speed
    result["providers"] = sorted({choice.provider for choice in providers.chosen})
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
