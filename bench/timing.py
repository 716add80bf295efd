"""Interleaved timing under pytest-benchmark, with device and host times on a GPU."""

import gc
import statistics
from collections.abc import Callable

import torch

from bench.clock import device_time, host_time, own_costs
from multilora_fast.benchmark.layer import FROZEN
from multilora_fast.benchmark.timing import Timed
from multilora_fast.memory.methods import LORA

ENQUEUED_TOKENS = 16  # too few to keep a GPU busy: the time is the host's


def compare(benchmark, timed: dict[str, Timed], ours: str, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Time ``ours`` by pytest-benchmark, and every other candidate before each of its rounds.

    The peers' seconds go to ``benchmark.extra_info["peers"]``, by round. Returns the median seconds of all.
    """
    seconds = {name: [] for name in timed if name != ours}

    def others():
        for name, times in seconds.items():
            times.append(timed[name].seconds())
        return (timed[ours].prepare(),), {}

    benchmark.pedantic(timed[ours].run, setup=others, rounds=rounds, warmup_rounds=warmup)
    counted = {name: times[-rounds:] for name, times in seconds.items()}
    benchmark.extra_info["peers"] = counted
    medians = {name: statistics.median(times) for name, times in counted.items()}
    if not benchmark.disabled:
        medians[ours] = benchmark.stats.stats.median
    return medians


def drop_failing(timed: dict[str, Timed], needed: tuple[str, ...]) -> dict[str, str]:
    """Remove each peer that does not run here, for example a compiled one, from ``timed``, and return the reasons.
    Raises the errors of ``needed``.
    """
    failed = {}
    for name, one in list(timed.items()):
        error = _failure(one.seconds)
        if error is not None and name in needed:
            raise error
        if error is not None:
            failed[name] = reason(error)
            del timed[name]
    return failed


def _failure(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def device_seconds(timed: dict[str, list[Timed]], clock: Callable[..., float] = device_time) -> tuple[dict, dict]:
    """GPU seconds by candidate, each from one graph of its calls, and why a candidate has none."""
    return _measured(timed, lambda parts: clock([lambda one=one: one.run(one.prepare()) for one in parts]))


def enqueue_seconds(timed: dict[str, Timed], clock: Callable[..., float] = host_time) -> tuple[dict, dict]:
    """Host seconds to enqueue one call by candidate, and why a candidate has none."""
    return _measured(timed, lambda one: clock(lambda: one.run(one.prepare())))


def _measured(timed: dict, microseconds: Callable) -> tuple[dict[str, float], dict[str, str]]:
    found, failed = {}, {}
    for name, one in timed.items():
        try:
            found[name] = 1e-6 * microseconds(one)
        except Exception as error:
            failed[name] = reason(error)
        for part in one if isinstance(one, list) else [one]:
            part.prepare()  # resets gradients, which a graph holds
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found, failed


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def add_clocks(info: dict, waited: dict[str, float], **clocks: tuple[dict[str, float], dict[str, str]]) -> None:
    """Add each clock's seconds to ``info``, the reasons for missing ones under "failed", and own costs by every clock
    under "own cost"; ``waited`` are the synchronized times.
    """
    for name, (seconds, failed) in clocks.items():
        info[name] = seconds
        if failed:
            info.setdefault("failed", {}).update({f"{who}, {name}": why for who, why in failed.items()})
    every = {"wall clock": waited, **{name: seconds for name, (seconds, _) in clocks.items()}}
    info["own cost"] = {name: own_costs(seconds, FROZEN, LORA) for name, seconds in every.items()}
