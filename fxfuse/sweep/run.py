"""Many units side by side, each in a process of its own with a time limit.

In: names of units and a Plan. Out: each UnitResult as it comes. The processes are forked from one
that has imported the libraries and touched no device.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess

import torch

from fxfuse.sweep.measure import Plan, measure
from fxfuse.sweep.results import UnitResult


@dataclass(frozen=True)
class Job:
    unit: str
    process: BaseProcess
    results: Connection
    started: float


def run_units(names: Sequence[str], plan: Plan, jobs: int, timeout: float) -> Iterator[UnitResult]:
    """Results in the order in which they are ready; at most `jobs` processes at a time."""
    waiting = list(names)
    running: list[Job] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(waiting.pop(0), plan))
        wait([job.results for job in running], timeout=1.0)
        for job in list(running):
            result = _finished(job, timeout)
            if result is not None:
                running.remove(job)
                yield result


def _start(unit: str, plan: Plan) -> Job:
    # CUDA does not survive a fork, and importing the libraries may have started it.
    spawn, fork = multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")
    context: SpawnContext | ForkContext = spawn if torch.cuda.is_available() else fork
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(unit, plan, send))
    process.start()
    send.close()
    return Job(unit, process, receive, time.monotonic())


def _child(unit: str, plan: Plan, results: Connection) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    try:
        results.send(measure(unit, plan))
    except Exception as error:
        results.send(UnitResult(unit, not_run=f"{type(error).__name__}: {error}"))


def _finished(job: Job, timeout: float) -> UnitResult | None:
    """The result of a job that is over, by itself or by its time; None while it runs."""
    if job.results.poll():
        try:
            result: UnitResult = job.results.recv()
        except EOFError:
            job.process.join()
            result = UnitResult(job.unit, not_run=f"exit code {job.process.exitcode}")
    elif time.monotonic() - job.started > timeout:
        job.process.kill()
        result = UnitResult(job.unit, not_run=f"more than {timeout:.0f} s")
    else:
        return None
    job.process.join()
    job.results.close()
    return result
