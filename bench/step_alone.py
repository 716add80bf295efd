"""Training steps, one method at a time: each is built, measured and freed before the next, so that large ones fit."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bench.clock import device_time
from bench.timing import reason
from multilora_fast.benchmark.layer import FROZEN
from multilora_fast.benchmark.timing import Timed
from multilora_fast.memory import peak_bytes, saved_bytes
from multilora_fast.memory.methods import LORA, OURS

NEEDED = (FROZEN, LORA, OURS)
LEAST_SECONDS = 15.0  # for one more method: build, warm up and compile


@dataclass
class Steps:
    """Seconds of synchronized steps, device seconds where a step was captured, bytes, and why a method has none."""

    median: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)


def training_step(model: nn.Module, tokens: Tensor, capturable: bool = False) -> Callable[[], None]:
    """Forward, backward and AdamW of the trainable parameters, if any; ``capturable`` in a CUDA graph."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, capturable=capturable) if trained else None

    def step(_=None) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure_alone(
    benchmark, builders: dict[str, Callable[[], nn.Module]], tokens: Tensor, rounds: int,
    seconds_left: Callable[[], float], captured: tuple[str, ...] = NEEDED, clock: Callable[..., float] = device_time,
) -> Steps:  # fmt: skip
    """Measure each of ``builders`` in turn, ours under pytest-benchmark, those in ``captured`` also as a CUDA graph.
    With less than :data:`LEAST_SECONDS` left, only :data:`NEEDED` are measured.
    """
    found = Steps()
    for name, build in builders.items():
        if name not in NEEDED and seconds_left() < LEAST_SECONDS:
            found.cut.append(name)
            continue
        timed = partial(_under_benchmark, benchmark, rounds) if name == OURS else partial(_synchronized, rounds)
        _attempt(
            found, name, name, lambda build=build, name=name, timed=timed: _eager(found, name, build, tokens, timed)
        )
        if name in captured and name in found.median:
            _attempt(found, name, f"{name}, captured", partial(_captured, found, name, build, tokens, clock))
    return found


def _attempt(found: Steps, name: str, what: str, measure: Callable[[], None]) -> None:
    """Run ``measure`` and free what it built. Record the reason of a failure, which is an error only for ours."""
    try:
        measure()
    except Exception as error:
        if what == OURS:
            raise
        found.failed[what] = reason(error)
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _eager(found: Steps, name: str, build: Callable, tokens: Tensor, timed: Callable) -> None:
    model = build().train()
    step = training_step(model, tokens)
    for _ in range(2):
        step()
    memory = {"peak": peak_bytes(step, tokens.device)}
    if "compiled" not in name:  # otherwise the byte counters would trigger recompilation
        with saved_bytes([*model.parameters(), *model.buffers(), tokens]) as saved:
            model(input_ids=tokens, labels=tokens)
        memory["saved"] = saved.total
        del saved
    found.median[name] = timed(step)
    found.memory[name] = memory


def _synchronized(rounds: int, step: Callable) -> float:
    timed = Timed(lambda: None, step)
    return statistics.median(timed.seconds() for _ in range(rounds))


def _under_benchmark(benchmark, rounds: int, step: Callable) -> float:
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=0)
    return _synchronized(1, step) if benchmark.disabled else benchmark.stats.stats.median


def _captured(found: Steps, name: str, build: Callable, tokens: Tensor, clock: Callable) -> None:
    step = training_step(build().train(), tokens, capturable=tokens.is_cuda)
    found.device[name] = 1e-6 * clock([step])
