"""Forward, backward and both of one layer, interleaved with its peers.

    pytest bench/test_layer.py --benchmark-json=OUT.json

Before anything is timed, output and gradients must pass the 2× rule against the reference in float64.
"""

import pytest
import torch

from bench.candidates import layers
from bench.floor import layer_work, rates
from bench.timing import compare
from multilora_fast.benchmark.layer import DIRECTIONS, FROZEN, LORA, OURS, REFERENCE, gate
from multilora_fast.benchmark.timing import timed_layer

CPU_SHAPES = [(1024, 2048, 2048), (1024, 576, 1536)]
GPU_SHAPES = [(8192, 4096, 4096), (8192, 4096, 11008), (8192, 11008, 4096)]
SHAPES = GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES
DTYPES = ["bfloat16"] if torch.cuda.is_available() else ["float32", "bfloat16"]


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "{}x{}-{}".format(*s))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layer(benchmark, direction, shape, dtype, n, p, tiny, device):
    if direction != "forward+backward" and n != 5:
        pytest.skip("the halves of a step are timed apart at n = 5")
    M, K, N = (64, 32, 48) if tiny else shape
    r, kind = 32, getattr(torch, dtype)
    gate(K, N, n, r, p, kind, device)
    x = torch.randn(M, K, dtype=kind, device=device).requires_grad_()
    dy = torch.randn(M, N, dtype=kind, device=device)
    timed = {name: timed_layer(layer, x, dy, direction) for name, layer in layers(K, N, n, r, p, kind, device).items()}
    medians = compare(benchmark, timed, OURS, rounds=15)

    settings = {"M": M, "K": K, "N": N, "n": n, "r": r, "dropout": p, "dtype": dtype, "direction": direction}
    benchmark.extra_info["settings"] = settings
    if tiny or benchmark.disabled:
        return
    measured = rates(device, kind)
    work = layer_work(M, K, N, n * r, kind.itemsize, direction)
    R = n * r
    extra = {"forward": 2, "backward": 4, "forward+backward": 6}[direction] * M * R * (K + N)
    frozen_flops = layer_work(M, K, N, 0, kind.itemsize, direction).flops
    benchmark.extra_info["work"] = {
        "flops": work.flops, "bytes": work.bytes, "rates": measured.as_dict(), "floor_seconds": work.seconds(measured),
        "floor_by_frozen_layer": medians[FROZEN] * (1 + extra / frozen_flops),
    }  # fmt: skip
    benchmark.extra_info["median"] = medians
    benchmark.extra_info["ratios"] = {
        "ours / PEFT LoRA": medians[OURS] / medians[LORA],
        "reference / ours": medians[REFERENCE] / medians[OURS],
        "ours / frozen": medians[OURS] / medians[FROZEN],
        "ours / floor": medians[OURS] / benchmark.extra_info["work"]["floor_by_frozen_layer"],
        "tokens per second": M / medians[OURS],
    }
