"""Projected sites as operands of the kernel: x, weights as a model holds them, and what follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.lowering import launch, projection_launch
from fxfuse.lowering.operand import Operand
from fxfuse.lowering.projection_launch import Block
from fxfuse.patterns.record import AddNorm, Norm, Record
from tests.sites import BARE, NORM, cached, halves, neighbours, site, with_dtype

EPS, X_EPS = (1e-6, 1e-6), 1e-5


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads, channels, hidden size and spelling of a projected site; `packed` as GPT-NeoX has it:
    q, k and v of a head side by side in one weight.
    """

    heads: int
    kv_heads: int
    channels: int
    hidden: int
    record: Record
    bias: bool = False
    packed: bool = False
    batch: int = 1
    tokens: int = 1

    def behind(self, norm: Norm, keep_sum: bool = True) -> Shape:
        """The same site with x the norm of a sum."""
        front = AddNorm(self.hidden, norm, 2, keep_sum)
        return dataclasses.replace(self, record=dataclasses.replace(self.record, front=front))


QWEN3 = site(32, norm=NORM, store=cached(True), heads_first=True, k_keep=False)
WIDE = site(128, norm=NORM, store=cached(True), heads_first=True, k_keep=False)
LLAMA = site(32, store=cached(False, "wrap"))
GPTJ = site(16, neighbours(16, 8), store=cached(True))
PHI = site(48, halves(48, 20), norm=NORM, store=cached(True))
GEMMA4 = site(32, norm=NORM, store=cached(True, "wrap"), k_keep=False, v_norm=BARE)
SHAPES = {
    "gemma4": Shape(4, 2, 32, 64, GEMMA4, batch=2),
    "qwen3": Shape(4, 2, 32, 64, QWEN3),
    "qwen3, 3 rows": Shape(4, 2, 32, 64, QWEN3, batch=3),
    # More rows than are rotated at once.
    "10 rows of 128": Shape(1, 1, 128, 32, WIDE, batch=10),
    "llama, bias, 5 tokens": Shape(4, 2, 32, 72, LLAMA, bias=True, tokens=5),
    "gptj, packed": Shape(3, 3, 16, 40, GPTJ, bias=True, packed=True),
    "phi, 2 x 3": Shape(2, 1, 48, 56, PHI, bias=True, batch=2, tokens=3),
}
GEMMA = Norm("head", "before", True, 1.0)
# The same with a norm of a sum in front, which the kernel takes of one row,
BEHIND_NORMS = {
    "qwen3, normed": SHAPES["qwen3"].behind(NORM),
    "qwen3, 1 + w": SHAPES["qwen3"].behind(GEMMA),
    "gptj, packed, no weight": SHAPES["gptj, packed"].behind(BARE),
    "llama, bias, sum not kept": Shape(4, 2, 32, 72, LLAMA, bias=True).behind(NORM, False),
}
# and the op of several.
ROWS_BEHIND_NORMS = {
    "qwen3, 3 rows, 1 + w": SHAPES["qwen3, 3 rows"].behind(GEMMA),
    "llama, bias, 5 tokens, sum not kept": SHAPES["llama, bias, 5 tokens"].behind(NORM, False),
    "phi, 2 x 3, normed": SHAPES["phi, 2 x 3"].behind(NORM),
}
SHAPES |= BEHIND_NORMS


def tensors(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", slots: int = 32, seed: int = 0
) -> dict[str, Tensor]:
    """The op's tensors by the names of its arguments."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=device)
        return (drawn * scale).to(dtype)

    h, g, d, hidden = shape.heads, shape.kv_heads, shape.channels, shape.hidden
    batch, tokens, record = shape.batch, shape.tokens, shape.record
    found = {"x": draw(batch, tokens, hidden)}
    if record.front is not None:
        found["residual"] = draw(batch, tokens, hidden, scale=3.0)
        if record.front.norm.has_weight:
            found["x_weight"] = draw(hidden)
    if shape.packed:
        whole, bias = draw(h, 3 * d, hidden, scale=hidden**-0.5), draw(h, 3 * d)
        for i, name in enumerate("qkv"):
            found[f"{name}_proj"] = whole[:, i * d : (i + 1) * d]
            found[f"{name}_proj_bias"] = bias[:, i * d : (i + 1) * d]
    else:
        for name, heads in (("q", h), ("k", g), ("v", g)):
            found[f"{name}_proj"] = draw(heads, d, hidden, scale=hidden**-0.5)
            if shape.bias:
                found[f"{name}_proj_bias"] = draw(heads, d)
    if record.q.norm is not None:
        found |= {"q_weight": draw(d), "k_weight": draw(d)}
    turn = record.q.rotation
    assert turn is not None and record.store is not None
    angle = draw(1, tokens, d)
    found |= {"cos": angle.cos(), "sin": angle.sin()}
    first = record.store.k.axes == "bh0d"
    for name in ("k_cache", "v_cache"):
        found[name] = draw(batch, g, slots, d) if first else draw(batch, slots, g, d)
    found["slots"] = torch.randperm(slots, generator=generator, device=device)[None, :tokens]
    return found


def truth(shape: Shape, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """q, k and the sum where they are kept, and the caches, in float64 from the sum as it is."""
    exact = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    if "residual" in given:
        exact["x"] = (given["x"] + given["residual"]).double()
        exact["residual"] = torch.zeros_like(exact["x"])
    exact |= {n: exact[n].clone() for n in ("k_cache", "v_cache")}
    record = with_dtype(shape.record, "float64")
    results = reference.project_norm_rope_store_(*arguments(exact), *EPS, record)
    return (*(x for x in results if x is not None), exact["k_cache"], exact["v_cache"])


def arguments(given: dict[str, Tensor]) -> list[Tensor | float | None]:
    """The op's arguments up to the eps of q and k, in order."""
    from fxfuse.lowering.providers import arguments

    names = arguments("project_norm_rope_store_")
    known = {**given, "x_eps": X_EPS}
    return [known.get(name) for name in names[: names.index("q_eps")]]


def planned(
    shape: Shape, given: dict[str, Tensor], block: Block | None = None
) -> tuple[launch.Launch, list[Tensor], Tensor]:
    """The launch, memory full of NaN for q, k and the sum where they are kept, the first two as
    [B, T, H, D], and the counters.
    """
    x = given["x"]
    dtype = str(x.dtype).removeprefix("torch.")
    record = with_dtype(shape.record, dtype)
    rows = shape.batch * shape.tokens

    def empty(*size: int) -> Tensor:
        return torch.full(size, float("nan"), dtype=x.dtype, device=x.device)

    results = []
    operands = dict(given)
    for name, stream, heads in (("q", record.q, shape.heads), ("k", record.k, shape.kv_heads)):
        if stream is not None and stream.keep:
            size = (shape.batch, shape.tokens, heads, shape.channels)
            at = (0, 2, 1, 3) if stream.heads_first else (0, 1, 2, 3)
            out = empty(*(size[i] for i in at)).permute(at)
            operands[f"{name}_out"] = out
            results.append(out)
    if record.front is not None and record.front.keep_sum:
        operands["x_sum"] = empty(*x.shape)
        results.append(operands["x_sum"])
    facts: dict[str, Any] = {n: Operand.of(t) for n, t in given.items()}
    total = projection_launch.sums_shape(facts, rows)
    operands["sums"] = torch.full(total, float("nan"), device=x.device)
    operands["counters"] = torch.zeros(1024, dtype=torch.int32, device=x.device)
    facts = {n: Operand.of(t) for n, t in operands.items()}
    plan = projection_launch.plan(record, facts, EPS, "", block, X_EPS)
    return plan, results, operands["counters"]


def errors(
    shape: Shape,
    dtype: torch.dtype,
    run: Callable[[launch.Launch], Any],
    device: str = "cpu",
    block: Block | None = None,
) -> list[float]:
    """Relative errors of results and caches against float64; counters are 0 again."""
    given = tensors(shape, dtype, device)
    want = truth(shape, given)
    plan, results, counters = planned(shape, given, block)
    run(plan)
    got = (*results, given["k_cache"], given["v_cache"])
    assert not counters.any()
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
