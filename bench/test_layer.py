"""Forward, backward and both of one layer, interleaved with its peers.

    pytest bench/test_layer.py --benchmark-json=OUT.json

Before timing, output and gradients must pass the 2× rule against the reference in float64. Calls are synchronized; on a
GPU, replays of captured graphs give the device time, and sixteen tokens without synchronization the host time. Backward
alone cannot be captured: its device time is the difference of the other two.
"""

from dataclasses import dataclass

import pytest
import torch

from bench.candidates import COMPILED, LORA_COMPILED, OURS_COMPILED, layers
from bench.floor import layer_work, rates
from bench.timing import ENQUEUED_TOKENS, add_clocks, compare, device_seconds, drop_failing, enqueue_seconds
from multilora_fast.benchmark.layer import DIRECTIONS, FROZEN, LORA, OURS, REFERENCE, gate
from multilora_fast.benchmark.timing import Timed, timed_layer

EVERY = (COMPILED, LORA_COMPILED, OURS_COMPILED)


@dataclass(frozen=True)
class Case:
    """A layer of K in_features and N out_features with n branches of rank 32, on M tokens."""

    M: int
    K: int
    N: int
    n: int
    p: float
    direction: str = "forward+backward"
    dtype: str = "bfloat16"
    compiled: tuple[str, ...] = ()
    enqueued: bool = False  # whether to time the host, whose cost does not depend on the size

    def __str__(self) -> str:
        return f"{self.direction}-{self.M}x{self.K}-{self.N}-{self.dtype}-{self.n}-{self.p:g}"


def gpu_cases() -> list[Case]:
    """The GPU's cases, most important first: a short run may be cut."""
    both = [
        Case(8192, 4096, 4096, 3, 0.0, compiled=EVERY, enqueued=True),
        Case(8192, 4096, 4096, 3, 0.05, compiled=EVERY, enqueued=True),
        *(Case(2048, 4096, 4096, 3, p) for p in (0.0, 0.05)),
        *(Case(1024, 4096, 4096, 3, p, compiled=EVERY) for p in (0.0, 0.05)),
        *(Case(8192, 4096, 4096, 5, p) for p in (0.0, 0.05)),
        *(Case(8192, K, N, 3, p) for K, N in ((4096, 11008), (11008, 4096)) for p in (0.0, 0.05)),
    ]
    return both + [Case(8192, 4096, 4096, 3, p, "forward") for p in (0.0, 0.05)]


def cpu_cases() -> list[Case]:
    """The CPU's cases; forward and backward are timed apart at n = 5."""
    found = []
    for direction in DIRECTIONS:
        both = direction == "forward+backward"
        compiled = EVERY if both else (COMPILED,)
        for M, K, N in ((1024, 2048, 2048), (1024, 576, 1536)):
            for dtype in ("float32", "bfloat16"):
                for n in (3, 5) if both else (5,):
                    found += [Case(M, K, N, n, p, direction, dtype, compiled) for p in (0.0, 0.05)]
    return found


@pytest.mark.parametrize("case", gpu_cases() if torch.cuda.is_available() else cpu_cases(), ids=str)
def test_layer(benchmark, case, tiny, device):
    M, K, N = (64, 32, 48) if tiny else (case.M, case.K, case.N)
    n, r, p, direction, kind = case.n, 32, case.p, case.direction, getattr(torch, case.dtype)
    gate(K, N, n, r, p, kind, device)
    found = layers(K, N, n, r, p, kind, device, case.compiled)

    def timed_layers(tokens: int) -> dict[str, Timed]:
        x = torch.randn(tokens, K, dtype=kind, device=device).requires_grad_()
        dy = torch.randn(tokens, N, dtype=kind, device=device)
        return {name: timed_layer(layer, x, dy, direction) for name, layer in found.items()}

    every = timed_layers(M)
    failed = drop_failing(every, (FROZEN, LORA, OURS, REFERENCE))
    found = {name: layer for name, layer in found.items() if name in every}
    medians = compare(benchmark, every, OURS, rounds=15)

    settings = {"M": M, "K": K, "N": N, "n": n, "r": r, "dropout": p, "dtype": case.dtype, "direction": direction}
    benchmark.extra_info["settings"] = settings
    if failed:
        benchmark.extra_info["failed"] = failed
    if tiny or benchmark.disabled:
        return
    measured = rates(device, kind)
    work = layer_work(M, K, N, n * r, kind.itemsize, direction)
    R = n * r
    extra = {"forward": 2, "backward": 4, "forward+backward": 6}[direction] * M * R * (K + N)
    frozen_flops = layer_work(M, K, N, 0, kind.itemsize, direction).flops
    clocks = {}
    if device == "cuda":
        sets = [every, timed_layers(M), timed_layers(M)]
        clocks["device"] = device_seconds({name: [each[name] for each in sets] for name in every})
        if case.enqueued:
            clocks["host"] = enqueue_seconds(timed_layers(ENQUEUED_TOKENS))
    add_clocks(benchmark.extra_info, medians, **clocks)
    best = benchmark.extra_info.get("device", medians)  # device time where available, without the host
    benchmark.extra_info["work"] = {
        "flops": work.flops, "bytes": work.bytes, "rates": measured.as_dict(), "floor_seconds": work.seconds(measured),
        "floor_by_frozen_layer": best[FROZEN] * (1 + extra / frozen_flops),
    }  # fmt: skip
    benchmark.extra_info["median"] = medians
    benchmark.extra_info["ratios"] = {
        "ours / PEFT LoRA": medians[OURS] / medians[LORA],
        "reference / ours": medians[REFERENCE] / medians[OURS],
        "ours / frozen": medians[OURS] / medians[FROZEN],
        "ours / floor": best[OURS] / benchmark.extra_info["work"]["floor_by_frozen_layer"],
        "tokens per second": M / medians[OURS],
    }
