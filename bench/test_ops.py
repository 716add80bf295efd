"""The three products, in forward and in backward, against a lower bound from their bytes and FLOPs.

    pytest bench/test_ops.py --benchmark-json=OUT.json

On a GPU these are the Triton kernels, timed by replays of a captured graph over inputs that exceed L2, with a token
count from each size class; elsewhere the torch matmuls of the torch backend. Each result is compared with float64
before timing. expand writes the output before the base product is added, or adds to an existing one.
"""

import pytest
import torch

from bench.clock import cache_bytes, cold_copies, device_time
from bench.floor import product_work, rates
from multilora_fast.ops import torch_backend
from multilora_fast.ops.backends import choose, load

GPU = torch.cuda.is_available()
USES = [
    "shrink forward", "shrink backward", "expand forward", "expand forward, added", "expand backward",
    "expand backward, added", "reduce forward", "reduce backward", "reduce both",
]  # fmt: skip
TOKENS, D = ((8192, 2048, 512, 64), 4096) if GPU else ((1024,), 2048)
DECODE = 64  # maximum tokens; training never uses so few


def call(ops, use: str, t: dict[str, torch.Tensor], keep, p: float):
    """Run one use with the tensors of ``t``, and return its results; expand works in place on t["y"]."""
    n = t["A"].shape[0]
    dropout = (keep, p) if p else ()
    match use:
        case "shrink forward":
            return (ops.shrink(t["x"], t["A"], None, 1.0, *dropout),)
        case "shrink backward":
            return (ops.shrink(t["x"], t["w"], t["s"], 2.0),)
        case "expand forward" | "expand forward, added":
            ops.expand(t["y"], t["h"], t["w"], t["s"], 2.0, accumulate="added" in use)
            return (t["y"],)
        case "expand backward" | "expand backward, added":
            ops.expand(t["y"], t["h"], t["A"], None, 1.0, *dropout, accumulate="added" in use)
            return (t["y"],)
        case "reduce forward":
            return ops.reduce_scaled(t["h"], t["x"], t["w"], t["s"], 2.0)
        case "reduce backward":
            return (ops.reduce(t["h"], t["x"], n, t["h"].dtype, *dropout),)
        case "reduce both":
            return ops.reduce_all(t["h"], t["y"], t["w"], t["s"], 2.0, t["h"], t["x"], t["h"].dtype, *dropout)


def inputs(rows: int, columns: int, n: int, r: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    def make(*size):
        return torch.randn(*size, device=device).to(dtype)

    return {
        "x": make(rows, columns), "y": make(rows, columns), "h": make(rows, n * r), "A": make(n, r, columns),
        "w": make(n, columns, r).transpose(1, 2), "s": make(n, columns),
    }  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_op(benchmark, tokens, use, n, p, tiny, device):
    drops = use.startswith(("shrink forward", "expand backward", "reduce backward", "reduce both"))
    if p and not drops:
        pytest.skip("this use has no dropout")
    if tokens <= DECODE and (p or "backward" in use or use.startswith("reduce")):
        pytest.skip("so few tokens are decoded, in forwards without dropout")
    rows, columns, r = (32, 48, 4) if tiny else (tokens, D, 32)
    dtype, torch_device = torch.bfloat16, torch.device(device)
    ops = load(choose(None, torch_device))
    torch.manual_seed(0)
    t = inputs(rows, columns, n, r, dtype, device)
    seed = torch.tensor([1], device=device)
    keep = ops.draw(seed, rows, columns, p, dtype)
    exact = {name: tensor.double() for name, tensor in t.items()}
    mask = torch_backend.Mask(ops.dropout_mask(seed, rows, columns, p).double()) if p else None
    truths = call(torch_backend, use, exact, mask, p)
    results = call(ops, use, {**t, "y": t["y"].clone()}, keep, p)
    for got, truth in zip(results, truths, strict=True):
        assert (got - truth).norm() <= 0.01 * truth.norm()

    def prepared():
        return (ops, use, t, ops.draw(seed, rows, columns, p, dtype), p), {}

    benchmark.pedantic(call, setup=prepared, rounds=5 if GPU else 30, warmup_rounds=3)
    benchmark.extra_info["settings"] = {
        "use": use, "M": rows, "D": columns, "n": n, "r": r, "dropout": p, "dtype": "bfloat16",
    }  # fmt: skip
    if benchmark.disabled or tiny:
        return
    work = product_work(use, rows, columns, n * r, 2)
    if GPU:
        copies = cold_copies(2 * columns * (rows + n * r), cache_bytes())
        sets = [t, *(inputs(rows, columns, n, r, dtype, device) for _ in range(copies - 1))]
        masks = [ops.draw(seed, rows, columns, p, dtype) for _ in sets]
        calls = [lambda t=t, keep=keep: call(ops, use, t, keep, p) for t, keep in zip(sets, masks, strict=True)]
        seconds = 1e-6 * device_time(calls * -(-8 // copies))
        benchmark.extra_info["device_seconds"] = seconds
    else:
        seconds = benchmark.stats.stats.median
    floor = work.seconds(rates(device, dtype))
    benchmark.extra_info |= {
        "floor_seconds": floor, "share_of_floor": floor / seconds,
        "GB/s": work.bytes / seconds / 1e9, "TFLOP/s": work.flops / seconds / 1e12,
    }  # fmt: skip
