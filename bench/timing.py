"""Interleaved timing under pytest-benchmark."""

import statistics

from multilora_fast.benchmark.timing import Timed


def compare(benchmark, timed: dict[str, Timed], ours: str, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Let pytest-benchmark time ``ours``, every other candidate being timed before each of its rounds.

    The others' seconds go to ``benchmark.extra_info["peers"]``, by round. Returns the median seconds of all.
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
