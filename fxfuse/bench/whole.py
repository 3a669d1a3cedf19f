"""Whole models, stock Inductor beside fxfuse: decode, prefill and generate() with a static cache,
and one denoise step.

In comes a model, out comes a Whole for each backend: the error against eager, what was fused, then
ms, memory, kernels and compile seconds. Each phase is compiled apart, at its own shape.
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
from fxfuse.bench import generation, groups, models, timing
from fxfuse.bench.groups import Kernel, Total
from fxfuse.bench.models import Model
from fxfuse.bench.rows import told as told_of
from fxfuse.bench.timing import Spread

PROMPT, WARM_UP, TURN, TRACED = 16, 6, 10, 5
# bfloat16 through many layers; garbage is near 1.4.
LARGEST = 0.1
PHASES = ("decode", "prefill", *generation.PHASES)
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
    step_bytes  the most that the steps of the warm-up had allocated, the recording of their graph
                among them, less what was before: weights, cache, other backends' results
    groups      GPU time and kernels of a decode step by what they are for
    traced      these kernels, in stream order

    Of a phase that makes many tokens in one call, ms are of one token.
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
    step_bytes: int | None = None
    kernels: int | None = None
    groups: dict[str, Total] | None = None
    traced: list[Kernel] = dataclasses.field(default_factory=list)
    compile_s: float = 0.0

    def tokens_per_s(self) -> float | None:
        """Of the whole batch; a prompt makes none."""
        if self.ms is None or self.phase not in ("decode", *generation.PHASES):
            return None
        return 1e3 * self.batch / self.ms.median


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

    eager     the model, uncompiled
    compiled  the model as a backend and a mode compile it
    prepare   before a check, and before each sample where `single`
    result    what is compared with eager
    step      what is timed
    tokens    made by one step
    """

    eager: Any
    compiled: Callable[[Any, str | None], Any]
    prepare: Callable[[], Any]
    result: Callable[[Any], Tensor]
    step: Callable[[Any], Any]
    single: bool
    tokens: int = 1


def _compiled(eager: Any, backend: Any, mode: str | None) -> Any:
    return torch.compile(eager, backend=backend, mode=mode)


def _phase(name: str, decoder: Decoder, args: Any) -> Phase:
    eager = decoder.eager
    compiled = functools.partial(_compiled, eager)
    if name == "decode":
        return Phase(
            eager,
            compiled,
            decoder.start,
            lambda model: decoder.logits(model, decoder.token).clone(),
            decoder.step,
            single=False,
        )
    if name == "prefill":
        prompt = decoder.prompt(args.prefill)
        return Phase(
            eager,
            compiled,
            decoder.cache.reset,
            lambda model: decoder.logits(model, prompt).clone(),
            lambda model: decoder.logits(model, prompt),
            single=True,
        )
    cache = decoder.cache if name == generation.KEPT else None
    call = generation.Call(eager, decoder.prompt(PROMPT), args.new_tokens, args.slots, cache)
    return Phase(
        call.eager,
        call.compiled,
        decoder.cache.reset,
        call.second_logits,
        lambda generate: generate(),
        single=True,
        tokens=args.new_tokens,
    )


@torch.no_grad()
def measure(model: Model, plan: Plan, args: Any, device: str, told: Told) -> None:
    """Every batch, phase and backend of one text model."""
    eager = models.made(model, device, args.layers)
    # A body with a head of ours has no generate().
    able = hasattr(eager, "generate")
    phases = [name for name in args.phases if able or name not in generation.PHASES]
    for batch, backends in plan.items():
        decoder = Decoder(eager, batch, args.slots, device)
        decoder.start()
        for name in phases:
            rows = [
                Whole(model.name, name, batch, backend, eager.config.num_hidden_layers)
                for backend in backends
            ]
            _fill(rows, _phase(name, decoder, args), args, device, told)


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
        compiled = functools.partial(_compiled, eager)
        phase = Phase(eager, compiled, lambda: None, result, result, single=False)
        _fill(rows, phase, args, device, told)


def _fill(rows: list[Whole], phase: Phase, args: Any, device: str, told: Told) -> None:
    """Compile each backend's model and compare it with eager; time those that are right in turns,
    so that what the machine does beside hits all of them.
    """
    phase.prepare()
    wanted = phase.result(phase.eager)
    torch.compiler.reset()
    mode = None if args.mode == "default" else args.mode
    timed: list[tuple[Whole, Any]] = []
    for row in rows:
        model = phase.compiled(BACKENDS[row.backend], mode)
        if row.backend == "inductor_gqa":
            model = _told_to_group(model)
        try:
            _check(row, phase, model, wanted, device)
            if row.wrong is None and not args.compile_only:
                step = _warm(row, phase, model, device)
                if device == "cuda" and phase.tokens == 1:
                    _trace(row, step, _before(phase))
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


def _warm(row: Whole, phase: Phase, model: Any, device: str) -> Callable[[], Any]:
    """A step that has settled: graphs are recorded."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held, before = torch.cuda.memory_allocated(), _before(phase)
    for _ in range(WARM_UP if phase.tokens == 1 else 2):
        before()
        phase.step(model)
    _wait(device)
    if device == "cuda":
        row.step_bytes = torch.cuda.max_memory_allocated() - held
    before()
    return functools.partial(phase.step, model)


def _time(timed: list[tuple[Whole, Any]], phase: Phase, rounds: int, device: str) -> None:
    """`rounds` samples of each, TURN at a time; of calls that make many tokens a turn of turns."""
    waited: dict[str, list[float]] = {row.backend: [] for row, _ in timed}
    queued: dict[str, list[float]] = {row.backend: [] for row, _ in timed}
    before = _before(phase)
    turn = TURN if phase.tokens == 1 else 1
    for _ in range(-(-rounds // TURN)):
        for row, model in timed:
            one = functools.partial(phase.step, model)
            _one(before, one, device)  # the first after another model waits for its weights
            taken = [_one(before, one, device) for _ in range(turn)]
            waited[row.backend] += [ms / phase.tokens for ms in taken]
            if device == "cuda" and not phase.single:
                queued[row.backend] += _queued(one, TURN)
    for row, _ in timed:
        row.ms = timing.spread(waited[row.backend])
        row.queued_ms = timing.spread(queued[row.backend]) if queued[row.backend] else None


def decoded(rounds: int) -> int:
    """How many tokens are decoded at most between two resets of the cache."""
    return len(BACKENDS) * (WARM_UP + 1 + TRACED + -(-rounds // TURN) * (2 * TURN + 2))


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


def _before(phase: Phase) -> Callable[[], Any]:
    """What every step of a single phase begins with: a prompt in a cache that is full fails."""
    return phase.prepare if phase.single else lambda: None


def _trace(row: Whole, step: Callable[[], Any], before: Callable[[], Any]) -> None:
    """The kernels of one step; of several steps the one with the median sum."""
    steps = []
    for _ in range(TRACED):
        before()
        steps.append(_kernels(step))
    steps.sort(key=lambda kernels: sum(kernel.us for kernel in kernels))
    row.traced = steps[TRACED // 2]
    row.kernels = len(row.traced)
    if row.phase == "decode":
        row.groups = groups.totals(row.traced, row.layers)


def _kernels(step: Callable[[], Any]) -> list[Kernel]:
    """Kernels of one step in stream order, without copies, fills and ranges of annotations."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    ran = [e for e in trace.events() or () if e.device_type.name == "CUDA"]
    ran = [e for e in ran if not (e.is_user_annotation or e.name.startswith(("Memcpy", "Memset")))]
    ran.sort(key=lambda e: e.time_range.start)
    return [Kernel(e.name, e.time_range.elapsed_us()) for e in ran]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
