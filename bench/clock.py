"""What a callable costs the GPU, and what it costs the host, apart.

The GPU's time is that of replays of a captured CUDA graph: Python ran once, at the capture, and is in no figure. The
gap that the GPU leaves between two kernels of one graph, about a microsecond, is. Host time is that of Python while it
enqueues, not waited for.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Calls = Sequence[Callable[[], object]]
BUSY_CYCLES = 400_000  # 200 to 300 us of a GPU's clock: longer than the host needs for one graph and two events


class Machine(Protocol):
    """What the clock asks of a device; a test gives it another one."""

    def warm_up(self, calls: Calls) -> None:
        """Run every call, outside any capture, and wait."""

    def capture(self, calls: Calls) -> Callable[[], None]:
        """The calls in order as one graph: what returns replays it."""

    def elapsed(self, replay: Callable[[], None]) -> float:
        """Microseconds of the device between an event before a replay and one after it."""

    def wait(self) -> None:
        """Until the device has nothing left to do."""


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
        torch.cuda._sleep(BUSY_CYCLES)  # an idle GPU would wait for the host between the events
        start.record()
        replay()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize()


def device_times(calls: Calls, replays: int = 8, warm_ups: int = 2, machine: Machine | None = None) -> list[float]:
    """Microseconds of the GPU for one call: the mean over ``calls``, one figure per replay.

    The calls are captured in order into one graph. Where each has inputs of its own, and all of them together outgrow
    L2 (:func:`cold_copies`), none finds its inputs there.

    Raises:
        RuntimeError: a call does what a graph cannot capture, such as waiting for the device.
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
    """Microseconds of the host to enqueue one call, the median of ``repeats`` runs of ``calls``, none waited for.

    It is the host's own time where the device is the faster one and its queue, of some thousand launches, never full.
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
    """How many inputs of ``bytes_each`` to rotate through so that a cache of ``cache`` bytes holds none that is read
    next; at least 2, and at most ``most``, which may leave the smallest ones in it."""
    return max(2, min(most, 1 + -(-cache // max(1, bytes_each))))


def cache_bytes() -> int:
    """The size of the GPU's L2."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def own_cost(time: float, frozen: float, lora: float) -> float | None:
    """(time − frozen) / (LoRA − frozen): what the branches cost as a share of what PEFT's LoRA costs. None where LoRA
    was not slower than the frozen layer, as in a run too noisy for the question."""
    return (time - frozen) / (lora - frozen) if lora > frozen else None


def own_costs(times: dict[str, float], frozen: str, lora: str) -> dict[str, float]:
    """:func:`own_cost` of every other candidate; empty where one of the two was not timed."""
    if not {frozen, lora} <= times.keys():
        return {}
    found = {name: own_cost(t, times[frozen], times[lora]) for name, t in times.items() if name not in (frozen, lora)}
    return {name: cost for name, cost in found.items() if cost is not None}
