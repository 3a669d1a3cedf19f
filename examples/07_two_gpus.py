"""Tensor parallelism: two processes have half of the heads each, and fuse their own.

    python examples/07_two_gpus.py

Over NCCL on two GPUs; where there are not two, over gloo on the CPU.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from tour import compare, qwen3, token_ids

import fxfuse

PROCESSES = 2
ON_GPUS = torch.cuda.device_count() >= PROCESSES
KIND, OVER = ("cuda", "nccl") if ON_GPUS else ("cpu", "gloo")


@torch.no_grad()
def work(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_RANK": str(rank)}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{rank}"
    own = torch.device("cuda", rank) if ON_GPUS else None
    if own is not None:
        torch.cuda.set_device(own)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(OVER, meeting, rank=rank, world_size=PROCESSES, device_id=own)
    mesh = dist.init_device_mesh(KIND, (PROCESSES,))
    model, ids = qwen3(device=KIND), token_ids(1, 7, device=KIND)
    want = model(ids, use_cache=False).logits

    plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    plan["o_proj"] = RowwiseParallel()
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, mesh, plan)
    got = torch.compile(model, backend=fxfuse.backend)(ids, use_cache=False).logits

    if rank == 0:
        print(f"{PROCESSES} processes over {OVER}, this one's heads:\n{fxfuse.last_report()}")
        compare("logits of both together", got, want)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder,), nprocs=PROCESSES)
