"""Candidates that take turns: a drift of the machine's speed meets all of them, so their ratios can be trusted."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.benchmark.utils.timer import timer  # waits for the device, then reads the clock


@dataclass
class Turn:
    """One candidate's part in a round: ``prepare()`` is not timed, ``run(prepared)`` is."""

    prepare: Callable[[], object]
    run: Callable[[Any], object]

    def seconds(self) -> float:
        prepared = self.prepare()
        start = timer()
        self.run(prepared)
        return timer() - start


def layer_turn(layer: nn.Module, x: Tensor, dy: Tensor, direction: str) -> Turn:
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


def take_turns(turns: dict[str, Turn], rounds: Iterable[object]) -> dict[str, list[float]]:
    """The seconds of every candidate, in each of ``rounds`` once."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in rounds:
        for name, turn in turns.items():
            seconds[name].append(turn.seconds())
    return seconds
