"""GPU time and host time of a callable, measured separately.

GPU time is measured on replays of a captured CUDA graph, so it contains no Python. It does contain the gap of about a
microsecond between two kernels of a graph. Host time is the Python time to enqueue the work, without synchronization.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Calls = Sequence[Callable[[], object]]
BUSY_CYCLES = 400_000  # 200 to 300 us of GPU clock: longer than the host needs to enqueue one graph and two events


class Machine(Protocol):
    """The device operations that the clock needs; tests substitute a fake."""

    def warm_up(self, calls: Calls) -> None:
        """Run every call outside of capture, then synchronize."""

    def capture(self, calls: Calls) -> Callable[[], None]:
        """Capture the calls in order into one graph, and return its replay."""

    def elapsed(self, replay: Callable[[], None]) -> float:
        """Microseconds on the device between an event before a replay and one after it."""

    def wait(self) -> None:
        """Synchronize with the device."""


class Cuda:
    """The current CUDA device."""

    def warm_up(self, calls: Calls) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.wait()

    def capture(self, calls: Calls) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def elapsed(self, replay: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)  # otherwise an idle GPU would wait for the host between the events
        start.record()
        replay()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()


def device_times(calls: Calls, replays: int = 8, warm_ups: int = 2, machine: Machine | None = None) -> list[float]:
    """GPU microseconds per call, averaged over ``calls``: one figure per replay.

    The calls are captured in order into one graph. Give each call inputs of its own that together exceed L2
    (:func:`cold_copies`), and no call finds its inputs there.

    Raises:
        RuntimeError: a call cannot be captured, for example because it synchronizes.
    """
    machine = machine or Cuda()
    machine.warm_up(calls)
    replay = machine.capture(calls)
    for _ in range(warm_ups):
        replay()
    machine.wait()
    return [machine.elapsed(replay) / len(calls) for _ in range(replays)]


def device_time(calls: Calls, replays: int = 8, machine: Machine | None = None) -> float:
    """The median of :func:`device_times`, in microseconds."""
    return statistics.median(device_times(calls, replays, machine=machine))


def host_time(call: Callable[[], object], calls: int = 40, repeats: int = 5, machine: Machine | None = None) -> float:
    """Host microseconds to enqueue one call: the median over ``repeats`` runs of ``calls``, without synchronization.

    This is pure host time as long as the device is faster and the launch queue, of about a thousand launches, is not
    full.
    """
    machine = machine or Cuda()
    for _ in range(3):
        call()
    found = []
    for _ in range(repeats):
        machine.wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append(1e6 * (time.perf_counter() - start) / calls)
    machine.wait()
    return statistics.median(found)


def cold_copies(bytes_each: int, cache: int, most: int = 64) -> int:
    """The number of input copies of ``bytes_each`` to rotate through so that a cache of ``cache`` bytes never holds the
    next one: at least 2 and at most ``most``, which for small inputs may be too few.
    """
    return max(2, min(most, 1 + -(-cache // max(1, bytes_each))))


def cache_bytes() -> int:
    """The size of the GPU's L2 in bytes."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def own_cost(time: float, frozen: float, lora: float) -> float | None:
    """(time − frozen) / (LoRA − frozen): the cost of the branches as a share of the cost of PEFT's LoRA. None where
    LoRA was not slower than the frozen layer, which happens in noisy runs.
    """
    return (time - frozen) / (lora - frozen) if lora > frozen else None


def own_costs(times: dict[str, float], frozen: str, lora: str) -> dict[str, float]:
    """:func:`own_cost` of every other candidate; empty where frozen or LoRA was not timed."""
    if not {frozen, lora} <= times.keys():
        return {}
    found = {name: own_cost(t, times[frozen], times[lora]) for name, t in times.items() if name not in (frozen, lora)}
    return {name: cost for name, cost in found.items() if cost is not None}
