"""The three products, each in its forward and its backward use, against the floor of its bytes and FLOPs.

    pytest bench/test_ops.py --benchmark-json=OUT.json

On a GPU the Triton kernels, elsewhere the torch matmuls that stand in for them. Each result is compared with the same
product in float64 before it is timed.
"""

import pytest
import torch

from bench.floor import product_work, rates
from multilora_fast.ops import torch_backend
from multilora_fast.ops.backends import choose, load

USES = ["shrink forward", "shrink backward", "expand forward", "expand backward", "reduce forward", "reduce backward"]
M, D = (8192, 4096) if torch.cuda.is_available() else (1024, 2048)


def call(ops, use: str, t: dict[str, torch.Tensor], keep, p: float):
    """One use with the tensors of ``t``; expand works in place on t["y"] and returns it."""
    n = t["A"].shape[0]
    dropout = (keep, p) if p else ()
    match use:
        case "shrink forward":
            return ops.shrink(t["x"], t["A"], None, 1.0, *dropout)
        case "shrink backward":
            return ops.shrink(t["x"], t["w"], t["s"], 2.0)
        case "expand forward":
            ops.expand(t["y"], t["h"], t["w"], t["s"], 2.0)
            return t["y"]
        case "expand backward":
            ops.expand(t["y"], t["h"], t["A"], None, 1.0, *dropout)
            return t["y"]
        case "reduce forward":
            return ops.reduce_scaled(t["h"], t["x"], t["w"], t["s"], 2.0)[0]
        case "reduce backward":
            return ops.reduce(t["h"], t["x"], n, t["h"].dtype, *dropout)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("use", USES)
def test_op(benchmark, use, n, p, tiny, device):
    drops = use in ("shrink forward", "expand backward", "reduce backward")
    if p and not drops:
        pytest.skip("this use has no dropout")
    rows, columns, r = (32, 48, 4) if tiny else (M, D, 32)
    dtype, torch_device = torch.bfloat16, torch.device(device)
    ops = load(choose(None, torch_device))
    torch.manual_seed(0)
    t = {
        "x": torch.randn(rows, columns), "y": torch.randn(rows, columns), "h": torch.randn(rows, n * r),
        "A": torch.randn(n, r, columns), "B": torch.randn(n, columns, r), "s": torch.randn(n, columns),
    }  # fmt: skip
    t = {name: tensor.to(device, dtype) for name, tensor in t.items()}
    t["w"] = t.pop("B").transpose(1, 2)
    seed = torch.tensor([1], device=device)
    keep = ops.draw(seed, rows, columns, p, dtype)
    exact = {name: tensor.double() for name, tensor in t.items()}
    mask = ops.dropout_mask(seed, rows, columns, p).double() if p else None
    truth = call(torch_backend, use, exact, mask, p)
    got = call(ops, use, {**t, "y": t["y"].clone()}, keep, p)
    assert (got - truth).norm() <= 0.01 * truth.norm()

    def turn():
        return (ops, use, t, ops.draw(seed, rows, columns, p, dtype), p), {}

    benchmark.pedantic(call, setup=turn, rounds=30, warmup_rounds=3)
    benchmark.extra_info["settings"] = {
        "use": use, "M": rows, "D": columns, "n": n, "r": r, "dropout": p, "dtype": "bfloat16",
    }  # fmt: skip
    if benchmark.disabled or tiny:
        return
    work, seconds = product_work(use.split()[0], rows, columns, n * r, 2), benchmark.stats.stats.median
    floor = work.seconds(rates(device, dtype))
    benchmark.extra_info |= {
        "floor_seconds": floor, "share_of_floor": floor / seconds,
        "GB/s": work.bytes / seconds / 1e9, "TFLOP/s": work.flops / seconds / 1e12,
    }  # fmt: skip
