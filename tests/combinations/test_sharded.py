"""FSDP2 and tensor parallelism: two processes over gloo, each compiles its part, and the result is
the single process's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import StaticCache

import fxfuse
from tests.combinations.two_processes import PROCESSES, in_two
from tests.models.families import FAMILIES
from tests.models.tiny import assert_close, build, token_ids

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
]
IDS = token_ids(7)
SITES = FAMILIES["qwen3"].rotary
COMPILERS = pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("aot_eager", marks=pytest.mark.null),
        pytest.param("inductor", marks=pytest.mark.cpu),
    ],
)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def outcome(model: Any, before: int, logits: Tensor) -> dict[str, Any]:
    return {"logits": whole(logits).detach(), "fused": fxfuse.counts()["attention"] - before}


# --- FSDP2 -------------------------------------------------------------------------------------


def trained_by_fsdp(compiler: str, by_layer: bool) -> dict[str, Any]:
    """Logits and gradients of a step; compiled whole, or each layer before it is sharded."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model: Any = build(FAMILIES["qwen3"]).train()
    backend = fxfuse.Backend(compiler=compiler, strict=True)
    before = fxfuse.counts()["attention"]
    for layer in model.model.layers:
        if by_layer:
            layer.compile(backend=backend)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    run = model if by_layer else torch.compile(model, backend=backend)
    logits = run(IDS, use_cache=False).logits
    logits.square().mean().backward()
    gradients = {n: whole(p.grad) for n, p in model.named_parameters()}
    return outcome(model, before, logits) | {"gradients": gradients}


@pytest.mark.parametrize(
    ("compiler", "by_layer"),
    [
        pytest.param("aot_eager", True, id="each layer", marks=pytest.mark.null),
        pytest.param("aot_eager", False, id="whole", marks=pytest.mark.null),
        pytest.param("inductor", True, id="each layer, inductor", marks=pytest.mark.cpu),
    ],
)
def test_fsdp(compiler: str, by_layer: bool, tmp_path: Path) -> None:
    model: Any = build(FAMILIES["qwen3"]).train()
    want = model(IDS, use_cache=False).logits
    want.square().mean().backward()
    for rank in in_two(trained_by_fsdp, tmp_path, compiler, by_layer):
        # FSDP's hooks stand between layers, and layers that are compiled apart share one graph.
        assert rank["fused"] >= 1
        assert_close(rank["logits"], want, "logits", tolerance=1e-5)
        for name, parameter in model.named_parameters():
            assert_close(rank["gradients"][name], parameter.grad, name, tolerance=1e-5)


# --- tensor parallelism ------------------------------------------------------------------------


@torch.no_grad()
def run_by_dtensor(compiler: str) -> dict[str, Any]:
    """Half of the heads in each process, by torch's own parallelize_module."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model: Any = build(FAMILIES["qwen3"])
    plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, mesh, {**plan, "o_proj": RowwiseParallel()})
    before = fxfuse.counts()["attention"]
    run = torch.compile(model, backend=fxfuse.Backend(compiler=compiler, strict=True))
    return outcome(model, before, run(IDS, use_cache=False).logits)


@torch.no_grad()
def run_by_plan(compiler: str, folder: Path) -> dict[str, Any]:
    """transformers' own plan for the model."""
    from transformers import Qwen3ForCausalLM
    from transformers.distributed import DistributedConfig

    model = Qwen3ForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=PROCESSES)
    ).eval()
    before = fxfuse.counts()
    # Projections of few rows are looked at too.
    backend = fxfuse.Backend(compiler=compiler, strict=True, gate="always")
    logits = prompt_and_token(torch.compile(model, backend=backend), model.config)
    stored = fxfuse.counts()["store"] - before["store"]
    report = fxfuse.last_report()
    assert report is not None
    refused = [r.reason for r in report.refused if r.stage == "projection"]
    return outcome(model, before["attention"], logits) | {"stored": stored, "refused": refused}


def prompt_and_token(run: Any, config: Any) -> Tensor:
    """Logits of a prompt and of one token after it, through a static cache."""
    cache = StaticCache(config=config, max_cache_len=16)
    calls = (IDS, token_ids(1, seed=2))
    parts = [run(ids, past_key_values=cache, use_cache=True).logits for ids in calls]
    return torch.cat([whole(part) for part in parts], 1)


@COMPILERS
@torch.no_grad()
def test_heads_by_dtensor(compiler: str, tmp_path: Path) -> None:
    want = build(FAMILIES["qwen3"])(IDS, use_cache=False).logits
    for rank in in_two(run_by_dtensor, tmp_path, compiler):
        assert rank["fused"] == SITES
        assert_close(rank["logits"], want, "logits", tolerance=1e-5)


@COMPILERS
@torch.no_grad()
def test_a_plan_of_transformers(compiler: str, tmp_path: Path) -> None:
    """Each process has a cache for its own heads, and its sites store to it."""
    model: Any = build(FAMILIES["qwen3"])
    model.save_pretrained(tmp_path / "model")
    want = prompt_and_token(model, model.config)
    for rank in in_two(run_by_plan, tmp_path, compiler, tmp_path / "model"):
        # The first call of a static cache makes its memory, as the graph's own or in one before it.
        assert rank["fused"] >= 2 * SITES and rank["stored"] >= SITES
        assert len(rank["refused"]) == SITES
        assert all("a projection whose weight the graph makes" in r for r in rank["refused"])
        assert_close(rank["logits"], want, "logits", tolerance=1e-5)
