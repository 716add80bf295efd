"""Interleaved timing: clock drift affects all candidates alike, so ratios are reliable."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.benchmark.utils.timer import timer  # synchronizes, then reads the clock


@dataclass
class Timed:
    """One candidate: ``run(prepare())``, of which ``run`` is timed."""

    prepare: Callable[[], object]
    run: Callable[[Any], object]

    def seconds(self) -> float:
        prepared = self.prepare()
        start = timer()
        self.run(prepared)
        return timer() - start


def timed_layer(layer: nn.Module, x: Tensor, dy: Tensor, direction: str) -> Timed:
    """The "forward", "backward" or "forward+backward" of a layer; gradients are dropped before each run."""

    def clear():
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None

    if direction == "backward":
        return Timed(lambda: (clear(), layer(x))[1], lambda y: y.backward(dy))
    if direction == "forward":
        return Timed(clear, lambda _: layer(x))
    return Timed(clear, lambda _: layer(x).backward(dy))


def interleaved(timed: dict[str, Timed], rounds: Iterable[object]) -> dict[str, list[float]]:
    """The seconds of every candidate, each run once per round."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in rounds:
        for name, one in timed.items():
            seconds[name].append(one.seconds())
    return seconds
