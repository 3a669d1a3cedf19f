"""A function run by two processes over gloo on the CPU, with what each returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PROCESSES = 2


def in_two(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `work(*args)` returns in process 0 and in process 1; an error of one is the test's."""
    mp.spawn(_one, (work, folder, args), nprocs=PROCESSES)
    return [torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(PROCESSES)]


def _one(rank: int, work: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
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
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=PROCESSES)
    try:
        torch.save(work(*args), folder / f"result_{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
