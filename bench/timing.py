"""Candidates that take turns: a drift of the machine's speed meets all of them, so their ratios can be trusted."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.benchmark.utils.timer import timer  # waits for the device, then reads the clock


@dataclass
class Turn:
    """One candidate's part in a round: ``prepare()`` is not timed, ``run(prepared)`` is."""

    prepare: Callable[[], object]
    run: Callable[[object], object]


def layer_turn(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor, direction: str) -> Turn:
    """The forward, the backward, or both ("forward+backward") of a layer; gradients are dropped before each turn."""

    def clear():
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    if direction == "backward":
        return Turn(lambda: (clear(), layer(x))[1], lambda y: y.backward(dy))
    if direction == "forward":
        return Turn(clear, lambda _: layer(x))
    return Turn(clear, lambda _: layer(x).backward(dy))


def contest(benchmark, turns: dict[str, Turn], ours: str, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Let pytest-benchmark time ``ours``, every other candidate taking its turn, timed, before each of its rounds.

    The others' seconds go to ``benchmark.extra_info["peers"]``, by round. Returns the median seconds of all.
    """
    seconds = {name: [] for name in turns if name != ours}

    def others():
        for name, times in seconds.items():
            prepared = turns[name].prepare()
            start = timer()
            turns[name].run(prepared)
            times.append(timer() - start)
            del prepared
        return (turns[ours].prepare(),), {}

    benchmark.pedantic(turns[ours].run, setup=others, rounds=rounds, warmup_rounds=warmup)
    counted = {name: times[-rounds:] for name, times in seconds.items()}
    benchmark.extra_info["peers"] = counted
    medians = {name: statistics.median(times) for name, times in counted.items()}
    if not benchmark.disabled:
        medians[ours] = benchmark.stats.stats.median
    return medians
