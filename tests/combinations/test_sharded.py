"""FSDP2 and tensor parallelism: two processes, over gloo on the CPU and over NCCL on two GPUs, each
compiles its part, and the result is the single process's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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

pytestmark = pytest.mark.long
SITES = FAMILIES["qwen3"].rotary
WITH_GLOO = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
ON_TWO_GPUS = [
    pytest.mark.cuda,
    pytest.mark.skipif(not dist.is_nccl_available(), reason="torch has no NCCL"),
    pytest.mark.skipif(torch.cuda.device_count() < PROCESSES, reason="needs two GPUs"),
]
PLACES = pytest.mark.parametrize(
    ("device", "compiler"),
    [
        pytest.param("cpu", "aot_eager", id="gloo-aot_eager", marks=[pytest.mark.null, WITH_GLOO]),
        pytest.param("cpu", "inductor", id="gloo-inductor", marks=[pytest.mark.cpu, WITH_GLOO]),
        pytest.param("cuda", "inductor", id="nccl-inductor", marks=ON_TWO_GPUS),
    ],
)


def qwen3(device: str) -> Any:
    return build(FAMILIES["qwen3"]).to(device)


def ids(device: str) -> Tensor:
    return token_ids(7).to(device)


def whole(x: Tensor) -> Tensor:
    """On the CPU, so that it outlives the process that made it."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu()


def outcome(before: int, logits: Tensor) -> dict[str, Any]:
    return {"logits": whole(logits), "fused": fxfuse.counts()["attention"] - before}


# --- FSDP2 -------------------------------------------------------------------------------------


def trained_by_fsdp(device: str, compiler: str, by_layer: bool) -> dict[str, Any]:
    """Logits and gradients of a step; compiled whole, or each layer before it is sharded."""
    mesh = init_device_mesh(device, (PROCESSES,))
    model = qwen3(device).train()
    backend = fxfuse.Backend(compiler=compiler, strict=True)
    before = fxfuse.counts()["attention"]
    for layer in model.model.layers:
        if by_layer:
            layer.compile(backend=backend)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    run = model if by_layer else torch.compile(model, backend=backend)
    logits = run(ids(device), use_cache=False).logits
    logits.square().mean().backward()
    gradients = {n: whole(p.grad) for n, p in model.named_parameters()}
    return outcome(before, logits) | {"gradients": gradients}


@pytest.mark.parametrize("by_layer", [True, False], ids=["each layer", "whole"])
@PLACES
def test_fsdp(device: str, compiler: str, by_layer: bool, tmp_path: Path) -> None:
    model = qwen3(device).train()
    want = model(ids(device), use_cache=False).logits
    want.square().mean().backward()
    for rank in in_two(trained_by_fsdp, tmp_path, device, compiler, by_layer):
        # FSDP's hooks stand between layers, and layers that are compiled apart share one graph.
        assert rank["fused"] >= 1
        assert_close(rank["logits"], whole(want), "logits", tolerance=1e-5)
        for name, parameter in model.named_parameters():
            assert_close(rank["gradients"][name], whole(parameter.grad), name, tolerance=1e-5)


# --- tensor parallelism ------------------------------------------------------------------------


@torch.no_grad()
def run_by_dtensor(device: str, compiler: str) -> dict[str, Any]:
    """Half of the heads in each process, by torch's own parallelize_module."""
    mesh = init_device_mesh(device, (PROCESSES,))
    model = qwen3(device)
    plan = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, mesh, {**plan, "o_proj": RowwiseParallel()})
    before = fxfuse.counts()["attention"]
    run = torch.compile(model, backend=fxfuse.Backend(compiler=compiler, strict=True))
    return outcome(before, run(ids(device), use_cache=False).logits)


@torch.no_grad()
def run_by_plan(device: str, compiler: str, folder: Path) -> dict[str, Any]:
    """transformers' own plan for the model, on the device that it finds."""
    from transformers import Qwen3ForCausalLM
    from transformers.distributed import DistributedConfig

    model = Qwen3ForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_plan="auto", tp_size=PROCESSES)
    ).eval()
    assert model.device.type == device
    before = fxfuse.counts()
    # Projections of few rows are looked at too.
    backend = fxfuse.Backend(compiler=compiler, strict=True, gate="always")
    logits = prompt_and_token(torch.compile(model, backend=backend), model.config, device)
    stored = fxfuse.counts()["store"] - before["store"]
    report = fxfuse.last_report()
    assert report is not None
    records = [site.record for site in report.fused if site.kind == "attention"]
    refused = [r.reason for r in report.refused if r.stage == "projection"]
    found = {"stored": stored, "records": records, "refused": refused}
    return outcome(before["attention"], logits) | found


def prompt_and_token(run: Any, config: Any, device: str) -> Tensor:
    """Logits of a prompt and of one token after it, through a static cache."""
    cache = StaticCache(config=config, max_cache_len=16)
    calls = (ids(device), token_ids(1, seed=2).to(device))
    parts = [run(part, past_key_values=cache, use_cache=True).logits for part in calls]
    return torch.cat([whole(part) for part in parts], 1)


@PLACES
@torch.no_grad()
def test_heads_by_dtensor(device: str, compiler: str, tmp_path: Path) -> None:
    want = whole(qwen3(device)(ids(device), use_cache=False).logits)
    for rank in in_two(run_by_dtensor, tmp_path, device, compiler):
        assert rank["fused"] == SITES
        assert_close(rank["logits"], want, "logits", tolerance=1e-5)


@PLACES
@torch.no_grad()
def test_a_plan_of_transformers(device: str, compiler: str, tmp_path: Path) -> None:
    """Each process has a cache for its own heads, and its sites store to it."""
    model = qwen3(device)
    model.save_pretrained(tmp_path / "model")
    want = prompt_and_token(model, model.config, device)
    for rank in in_two(run_by_plan, tmp_path, device, compiler, tmp_path / "model"):
        # The first call of a static cache makes its memory, as the graph's own or in one before it.
        assert rank["fused"] >= 2 * SITES and rank["stored"] >= SITES
        # Where the plan breaks the graph (transformers 5.17), projections are of another one.
        assert len(rank["refused"]) == len(rank["records"]) in (0, SITES)
        assert not any(record.projected for record in rank["records"])
        assert all("a projection whose weight the graph makes" in r for r in rank["refused"])
        assert_close(rank["logits"], want, "logits", tolerance=1e-5)
