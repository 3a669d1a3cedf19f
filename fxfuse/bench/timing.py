"""Times of single calls: CUDA graphs over rotating buffers on a GPU, the clock on a CPU.

A Sampler gives µs of one call, averaged over one round of many; `interleaved` asks all samplers of
a row in turn, so that a drift of the machine meets all alike.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Sampler = Callable[[], float]
WARM_UP = 3
# Its streams and events have no types.
cuda: Any = torch.cuda


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile, in µs or what the samples are in."""

    median: float
    p20: float
    p80: float


def spread(samples: Sequence[float]) -> Spread:
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), fifths[0], fifths[3])


def interleaved(samplers: Mapping[str, Sampler], rounds: int) -> dict[str, Spread]:
    """Each sampler's spread over the rounds, all samplers in turn in each, after a warm-up."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for i in range(WARM_UP + rounds):
        for name, sample in samplers.items():
            us = sample()
            if i >= WARM_UP:
                samples[name].append(us)
    return {name: spread(values) for name, values in samples.items()}


def in_turn(samplers: Sequence[Sampler]) -> Sampler:
    """A Sampler that asks the next of `samplers` each time."""
    order = itertools.cycle(samplers)
    return lambda: next(order)()


def sampler(device: str, calls: Sequence[Callable[[], Any]], count: int) -> Sampler:
    """A Sampler that goes round `calls`, `count` a sample; on a CPU as many as take 2 ms."""
    return _graph(calls, count) if device == "cuda" else _clock(calls)


def _graph(calls: Sequence[Callable[[], Any]], count: int) -> Sampler:
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        # Held, so that the graph's allocator cannot give every call the same output.
        held = [calls[i % len(calls)]() for i in range(count)]

    def sample(held: Any = held) -> float:
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        # The first replay hides what launching the second one costs the host.
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / count

    return sample


def _clock(calls: Sequence[Callable[[], Any]]) -> Sampler:
    def seconds(count: int) -> float:
        start = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        return time.perf_counter() - start

    seconds(len(calls))
    count = len(calls) * max(1, int(2e-3 / seconds(len(calls))))
    return lambda: seconds(count) * 1e6 / count


def buffer_count(device: str, moved_bytes: int, tokens: int) -> int:
    """Sets of buffers that a row goes round: from 256 tokens on more than the L2 cache holds."""
    if device == "cpu":
        return 2
    if tokens < 256:
        return 8
    l2_bytes: int = torch.cuda.get_device_properties(0).L2_cache_size
    return min(256, max(8, -(-2 * l2_bytes // moved_bytes) + 1))


PLACEMENTS, PLACED_BYTES = 4, 2 * 10**9


def placement_count(device: str, set_bytes: int, tokens: int) -> int:
    """How often the sets of buffers of a row are drawn anew, at other addresses: on a GPU few
    tokens take up to 6 % more or less, as their buffers lie.
    """
    if device == "cpu" or tokens >= 256:
        return 1
    return max(1, min(PLACEMENTS, PLACED_BYTES // set_bytes))


def call_count(sets: int, moved_bytes: int, copy_speed: float) -> int:
    """Calls in one graph: whole rounds of the sets, about 2 ms, at most 256 or one round."""
    expected_us = moved_bytes / copy_speed + 1.5
    return sets * max(1, round(min(2000 / expected_us, 256) / sets))


def copy_bytes_per_us(device: str) -> float:
    """Bytes read and written by a large copy, the best of two kernels and ten runs of each."""
    size = 2**30 if device == "cuda" else 2**26
    x = torch.ones(size // 4, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    kernels = (lambda: y.copy_(x), lambda: torch.neg(x, out=y))
    return max(2 * size / min(_once(device, call) for _ in range(10)) for call in kernels)


def _once(device: str, call: Callable[[], Any]) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def copy_sampler(device: str, moved_bytes: int, sets: int, count: int) -> Sampler:
    """A plain kernel that reads and writes as many bytes as a row does, round as many buffers."""
    n = max(1, moved_bytes // 8)
    pairs = [torch.randn(2, n, device=device) for _ in range(sets)]
    calls = [lambda pair=pair: torch.neg(pair[0], out=pair[1]) for pair in pairs]
    return sampler(device, calls, count)


def smallest_kernel_us(device: str) -> float:
    """A kernel that writes one element: what any launch costs."""
    x = torch.zeros(1, device=device)
    return interleaved({"": sampler(device, [lambda: x.fill_(1.0)], 256)}, 20)[""].median
