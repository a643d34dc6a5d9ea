"""Timing of callables side by side: each round calls one after the other, so a machine that drifts slows all alike.

A callable is warmed up, then called until it has used its share of time, within limits on the number of calls. Slow
ones take part in fewer rounds, spread over all of them. On a GPU a callable is captured once in a CUDA graph and
replayed between CUDA events; what cannot be captured is launched call by call. With `use_graphs=False` it is called as
it stands and waited for, which is what its caller would wait.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

MIN_CALLS, MAX_CALLS = 15, 300
SLOW_SECONDS, MIN_SLOW_CALLS = 1.5, 3
"""A callable that needs longer than this for MIN_CALLS calls makes fewer, at least 3."""
_SLOW_CALL = SLOW_SECONDS / MIN_SLOW_CALLS


_QUIET = 0.05
"""Share of a processor that other jobs may have before the user is warned."""


class Timing(NamedTuple):
    """Microseconds of one call."""

    median_us: float
    p20_us: float
    p80_us: float
    p95_us: float


def measure(
    callables: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float = 0.2,
    calls_per_sample: int = 1,
    use_graphs: bool = True,
    known_costs: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Time each of `callables`, which run on `device`.

    Args:
        seconds: Seconds for each callable, without the warm-up.
        calls_per_sample: Number of calls between two readings of the clock, for very short calls.
        known_costs: Seconds of a call that was made already, if it was slow enough to need no warm-up.
        use_graphs: On a GPU, capture the callables, so that Python's time to launch them does not count.
    """
    sample, timed = _sample_on_cpu, dict(callables)
    if device.type == "cuda":
        sample = _sample_on_gpu if use_graphs else _sample_and_wait
        if use_graphs:
            timed = {name: _capture(call) for name, call in callables.items()}
    targets = {}
    for name, call in timed.items():
        cost = (known_costs or {}).get(name, 0.0)
        if cost < _SLOW_CALL:
            cost = sample(call, 1)
        if cost < _SLOW_CALL:  # a slower one is as slow when warm
            cost = min(sample(call, calls_per_sample) for _ in range(2)) * calls_per_sample
        fewest = MIN_CALLS if MIN_CALLS * cost <= SLOW_SECONDS else max(MIN_SLOW_CALLS, int(SLOW_SECONDS / cost))
        targets[name] = min(max(fewest, int(seconds / cost)), MAX_CALLS)
    num_rounds = max(targets.values())
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for index in range(num_rounds):
        for name, call in timed.items():
            if (index + 1) * targets[name] // num_rounds > len(samples[name]):
                samples[name].append(sample(call, calls_per_sample))
    return {name: _summary(values) for name, values in samples.items()}


class Timer:
    """Calls `measure` on one device, and measures the share of the processor that other jobs had meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wall = self._own = 0.0

    def measure(self, callables: Mapping[str, Callable[[], Any]], **options: Any) -> dict[str, Timing]:
        start = time.perf_counter(), time.process_time()
        timings = measure(callables, self._device, **options)
        self._wall += time.perf_counter() - start[0]
        self._own += time.process_time() - start[1]
        return timings

    def other_jobs(self) -> float | None:
        """Return the share, and warn if it is not small; None if more than one thread did the work."""
        if self._device.type != "cpu" or torch.get_num_threads() > 1 or not self._wall:
            return None
        share = max(0.0, 1 - self._own / self._wall)
        if share > _QUIET:
            print(
                f"warning: other jobs had {share:.0%} of this processor. They hit long calls, so mostly the baselines, "
                "hardest: repeat on a quiet machine before quoting a number"
            )
        return share


def _summary(seconds: list[float]) -> Timing:
    twentieths = statistics.quantiles(seconds, n=20, method="inclusive")
    p20, p80, p95 = twentieths[3], twentieths[15], twentieths[18]
    return Timing(*(1e6 * value for value in (statistics.median(seconds), p20, p80, p95)))


def _sample_on_cpu(call: Callable[[], Any], num_calls: int) -> float:
    start = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - start) / num_calls


def _sample_and_wait(call: Callable[[], Any], num_calls: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(num_calls):
        call()
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / num_calls


def _sample_on_gpu(call: Callable[[], Any], num_calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num_calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / num_calls


def _capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of `call`, or `call` itself if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay
