"""Time and memory of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of a call.

    Attributes:
        median: of all rounds.
        low: the first quartile.
        high: the third.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The median and the quartiles of one run or more."""
        # Twice each, since quantiles wants two values at least; none of the three changes.
        low, median, high = statistics.quantiles([*seconds] * 2, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved_medians(
    calls: Mapping[str, Call], rounds: int, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each call, see :func:`interleaved_timings`."""
    timings = interleaved_timings(calls, rounds, warmup)
    return {name: timing.median for name, timing in timings.items()}


def interleaved_timings(
    calls: Mapping[str, Call], rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Seconds of each call; the calls take turns, so that drift hits all alike."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in times.items()}


def peak_cpu_memory(call: Call) -> int:
    """Bytes that the call holds at its peak beyond what was held before, counted exactly.

    The allocation events of PyTorch's profiler are summed in order; memory of other allocators
    (oneDNN's scratch space) is not among them.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
