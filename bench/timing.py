"""Candidates in turns, under pytest-benchmark."""

import statistics

from multilora_fast.benchmark.timing import Turn


def contest(benchmark, turns: dict[str, Turn], ours: str, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Let pytest-benchmark time ``ours``, every other candidate taking its turn, timed, before each of its rounds.

    The others' seconds go to ``benchmark.extra_info["peers"]``, by round. Returns the median seconds of all.
    """
    seconds = {name: [] for name in turns if name != ours}

    def others():
        for name, times in seconds.items():
            times.append(turns[name].seconds())
        return (turns[ours].prepare(),), {}

    benchmark.pedantic(turns[ours].run, setup=others, rounds=rounds, warmup_rounds=warmup)
    counted = {name: times[-rounds:] for name, times in seconds.items()}
    benchmark.extra_info["peers"] = counted
    medians = {name: statistics.median(times) for name, times in counted.items()}
    if not benchmark.disabled:
        medians[ours] = benchmark.stats.stats.median
    return medians
