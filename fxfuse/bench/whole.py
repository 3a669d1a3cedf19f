"""Whole models, stock Inductor beside fxfuse: decode and prefill with a static cache, and one
denoise step.

In comes a model, out comes a Whole for each backend: the error against eager, what was fused, then
ms, kernels and compile seconds. Prefill and decode are compiled apart, each at its own shape.
"""

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fxfuse
from fxfuse.bench import models, timing
from fxfuse.bench.models import Model
from fxfuse.bench.rows import told as told_of
from fxfuse.bench.timing import Spread

PROMPT, WARM_UP, TURN = 16, 6, 10
# bfloat16 through many layers; garbage is near 1.4.
LARGEST = 0.1
PHASES = ("decode", "prefill")
# inductor_gqa: stock, with transformers told to keep heads grouped by a switch of its environment;
# a backend of another value, or torch would share what it compiled for the first.
BACKENDS: dict[str, Any] = {
    "inductor": "inductor",
    "inductor_gqa": fxfuse.Backend(disable=("attention",)),
    "fxfuse": fxfuse.backend,
}
GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"


# Backends by batch, and who is told of each row.
Plan = dict[int, list[str]]


@dataclasses.dataclass
class Whole:
    """One phase of one model under one backend.

    error       logits against eager's, relative
    sites       fused attention sites, and of these the ones with their store
    ms          one step at a time, the host waiting for each, as when tokens are streamed
    queued_ms   the same steps queued without waiting
    """

    model: str
    phase: str
    batch: int
    backend: str
    layers: int
    error: float = 0.0
    wrong: str | None = None
    sites: int = 0
    stores: int = 0
    ms: Spread | None = None
    queued_ms: Spread | None = None
    kernels: int | None = None
    compile_s: float = 0.0


Told = Callable[[Whole], None]


class Decoder:
    """Greedy decoding by hand over one static cache."""

    def __init__(self, eager: Any, batch: int, slots: int, device: str) -> None:
        transformers = import_module("transformers")
        self.eager = eager
        self.cache: Any = transformers.StaticCache(config=eager.config, max_cache_len=slots)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def prompt(self, tokens: int) -> Tensor:
        """The same random tokens in every run."""
        generator = torch.Generator(self.token.device).manual_seed(1)
        size, vocabulary = (len(self.token), tokens), self.eager.config.vocab_size
        return torch.randint(vocabulary, size, generator=generator, device=self.token.device)

    def start(self) -> None:
        """An eager prompt: the same state for every backend."""
        self.cache.reset()
        self.token.copy_(self.logits(self.eager, self.prompt(PROMPT)).argmax(-1))

    def step(self, model: Any) -> None:
        self.token.copy_(self.logits(model, self.token).argmax(-1))

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """The last token's, [B, 1, vocabulary]."""
        out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits
        return logits


@dataclasses.dataclass(frozen=True)
class Phase:
    """What is checked once, and timed many times.

    prepare   before a check, and before each sample where `single`
    result    what is compared with eager
    step      what is timed
    """

    prepare: Callable[[], Any]
    result: Callable[[Any], Tensor]
    step: Callable[[Any], Any]
    single: bool


def _phases(decoder: Decoder, tokens: int) -> dict[str, Phase]:
    prompt = decoder.prompt(tokens)
    return {
        "decode": Phase(
            decoder.start,
            lambda model: decoder.logits(model, decoder.token).clone(),
            decoder.step,
            single=False,
        ),
        "prefill": Phase(
            decoder.cache.reset,
            lambda model: decoder.logits(model, prompt).clone(),
            lambda model: decoder.logits(model, prompt),
            single=True,
        ),
    }


@torch.no_grad()
def measure(model: Model, plan: Plan, args: Any, device: str, told: Told) -> None:
    """Every batch, phase and backend of one text model."""
    eager = models.made(model, device, args.layers)
    for batch, backends in plan.items():
        decoder = Decoder(eager, batch, args.slots, device)
        decoder.start()
        phases = _phases(decoder, args.prefill)
        for name in args.phases:
            rows = [
                Whole(model.name, name, batch, backend, eager.config.num_hidden_layers)
                for backend in backends
            ]
            _fill(rows, phases[name], eager, args, device, told)


@torch.no_grad()
def denoise(plan: Plan, args: Any, device: str, told: Told) -> None:
    """One step of Flux's transformer under each backend."""
    eager, arguments, depth = models.flux(device, args.layers)
    for batch, backends in plan.items():
        given = arguments(batch)

        def result(model: Any, given: Any = given) -> Tensor:
            out: Tensor = model(**given, return_dict=False)[0]
            return out.clone()

        rows = [Whole("Flux", "denoise", batch, backend, depth) for backend in backends]
        phase = Phase(lambda: None, result, result, single=False)
        _fill(rows, phase, eager, args, device, told)


def _fill(rows: list[Whole], phase: Phase, eager: Any, args: Any, device: str, told: Told) -> None:
    """Compile each backend's model and compare it with eager; time those that are right in turns,
    so that what the machine does beside hits all of them.
    """
    phase.prepare()
    wanted = phase.result(eager)
    torch.compiler.reset()
    mode = None if args.mode == "default" else args.mode
    timed: list[tuple[Whole, Any]] = []
    for row in rows:
        model = torch.compile(eager, backend=BACKENDS[row.backend], mode=mode)
        if row.backend == "inductor_gqa":
            model = _told_to_group(model)
        try:
            _check(row, phase, model, wanted, device)
            if row.wrong is None and not args.compile_only:
                row.kernels = _kernels(_warm(phase, model), device)
                timed.append((row, model))
        except Exception as problem:
            row.wrong = told_of(problem)
    _time(timed, phase, args.rounds, device)
    for row in rows:
        told(row)


def _told_to_group(model: Any) -> Any:
    """The model with transformers' switch for grouped heads on while it runs, and is traced."""

    def run(**inputs: Any) -> Any:
        os.environ[GROUPED] = "1"
        try:
            return model(**inputs)
        finally:
            del os.environ[GROUPED]

    return run


def _check(row: Whole, phase: Phase, model: Any, wanted: Tensor, device: str) -> None:
    """Compile by a first call, compare with eager, note what was fused."""
    before = fxfuse.counts()
    phase.prepare()
    start = time.perf_counter()
    got = phase.result(model)
    _wait(device)
    row.compile_s = time.perf_counter() - start
    row.error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
    after = fxfuse.counts()
    row.sites, row.stores = (after[key] - before[key] for key in ("attention", "store"))
    if not row.error <= LARGEST:
        row.wrong = f"error {row.error:.2e} against eager"


def _warm(phase: Phase, model: Any) -> Callable[[], Any]:
    """A step that has settled: graphs are recorded."""
    for _ in range(WARM_UP):
        if phase.single:
            phase.prepare()
        phase.step(model)
    if phase.single:
        phase.prepare()
    return functools.partial(phase.step, model)


def _time(timed: list[tuple[Whole, Any]], phase: Phase, rounds: int, device: str) -> None:
    """`rounds` samples of each, TURN at a time."""
    waited: dict[str, list[float]] = {row.backend: [] for row, _ in timed}
    queued: dict[str, list[float]] = {row.backend: [] for row, _ in timed}
    before = phase.prepare if phase.single else lambda: None
    for _ in range(-(-rounds // TURN)):
        for row, model in timed:
            one = functools.partial(phase.step, model)
            one()  # the first after another model waits for its weights
            waited[row.backend] += [_one(before, one, device) for _ in range(TURN)]
            if device == "cuda" and not phase.single:
                queued[row.backend] += _queued(one, TURN)
    for row, _ in timed:
        row.ms = timing.spread(waited[row.backend])
        row.queued_ms = timing.spread(queued[row.backend]) if queued[row.backend] else None


def decoded(rounds: int) -> int:
    """How many tokens are decoded at most between two resets of the cache."""
    return len(BACKENDS) * (WARM_UP + 2 + -(-rounds // TURN) * (2 * TURN + 2))


def _one(before: Callable[[], Any], step: Callable[[], Any], device: str) -> float:
    before()
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _queued(step: Callable[[], Any], rounds: int) -> Sequence[float]:
    """ms between events after each of many steps that nobody waits for."""
    marks = [timing.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for mark in marks:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [float(a.elapsed_time(b)) for a, b in itertools.pairwise(marks)]


def _kernels(step: Callable[[], Any], device: str) -> int | None:
    """Kernels of one step, copies and fills not counted; None without a GPU."""
    _wait(device)
    if device != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in trace.events() or () if e.device_type.name == "CUDA"]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
