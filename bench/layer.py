"""Forward + backward of one layer, side by side in one run: ``python -m bench.layer [--json OUT]``.

The candidates take turns within every round, so a drift of the machine's speed meets all of them; medians and their
ratios are reported. Ours must pass the 2× rule against the float64 reference first.
"""

import argparse
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from bench.candidates import layers
from multilora_fast import __version__, multilora_linear
from multilora_fast.testing import assert_two_times_rule, random_case


def step(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    layer(x).backward(dy)
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def interleaved(candidates: dict, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each candidate (a function of nothing) in each round, in turns, after ``warmup`` rounds."""
    seconds = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(M: int, K: int, N: int, n: int, r: int, p: float, dtype: torch.dtype, rounds: int) -> dict:
    assert_two_times_rule(partial(multilora_linear, scaling_factor=2.0), random_case((64, K), N, n, r, dtype=dtype))
    x = torch.randn(M, K, dtype=dtype).requires_grad_()
    dy = torch.randn(M, N, dtype=dtype)
    runs = {name: partial(step, layer, x, dy) for name, layer in layers(K, N, n, r, p, dtype, "cpu").items()}
    seconds = interleaved(runs, rounds)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    R = n * r
    floor = medians["frozen base"] * (1 + 3 * R * (K + N) / (2 * K * N))
    return {
        "settings": {"M": M, "K": K, "N": N, "n": n, "r": r, "dropout": p, "dtype": str(dtype), "rounds": rounds},
        "seconds": seconds,
        "median": medians,
        "floor": floor,
        "ratios": {
            "reference / ours": medians["reference"] / medians["ours"],
            "ours / PEFT LoRA": medians["ours"] / medians["PEFT LoRA"],
            "ours / floor": medians["ours"] / floor,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--in-features", type=int, default=2048)
    parser.add_argument("--out-features", type=int, default=2048)
    parser.add_argument("--lora-num", type=int, default=5)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    result = measure(
        a.tokens, a.in_features, a.out_features, a.lora_num, a.r, a.dropout, getattr(torch, a.dtype), a.rounds
    )
    result["environment"] = {
        "machine": platform.machine(), "threads": a.threads, "torch": torch.__version__, "version": __version__,
    }  # fmt: skip
    for name, seconds in result["median"].items():
        print(f"{name:12} {1e3 * seconds:8.1f} ms  {seconds / result['median']['frozen base']:.2f}x the frozen layer")
    for name, ratio in result["ratios"].items():
        print(f"{name:16} {ratio:.3f}")
    if a.json:
        a.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
