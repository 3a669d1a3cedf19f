"""A function run by two processes, over gloo on the CPU or over NCCL with a GPU each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PROCESSES = 2
# What carries the collectives of a device, and what hides the others from both processes.
OVER = {"cpu": "gloo", "cuda": "nccl"}
HIDDEN = {"cpu": {"CUDA_VISIBLE_DEVICES": ""}, "cuda": {}}


def in_two(work: Callable[..., Any], folder: Path, device: str, *args: Any) -> list[Any]:
    """What `work(device, *args)` returns in process 0 and in process 1; an error of one is the
    test's.
    """
    with patch.dict(os.environ, HIDDEN[device]):
        mp.spawn(_one, (work, folder, device, args), nprocs=PROCESSES)
    return [torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(PROCESSES)]


def _one(
    rank: int, work: Callable[..., Any], folder: Path, device: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "GLOO_SOCKET_IFNAME": "lo",
        # Each process its own cache, so that neither waits for what the other compiles.
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache_{rank}"),
    }
    own = torch.device(device, rank) if device == "cuda" else None
    if own is not None:
        torch.cuda.set_device(own)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group(OVER[device], meeting, rank=rank, world_size=PROCESSES, device_id=own)
    try:
        torch.save(work(device, *args), folder / f"result_{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
