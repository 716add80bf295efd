"""Lower bounds for the time of a step: FLOPs and bytes over measured device rates."""

from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class Rates:
    """Measured bytes/s of a copy (read + written) and FLOP/s of a large matrix product."""

    copy: float
    matrix: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@cache
def rates(device: str, dtype: torch.dtype) -> Rates:
    """Measure the rates on this device with the current number of torch threads (medians)."""
    size = 2**28 if device == "cuda" else 2**25
    a = torch.empty(size, dtype=torch.uint8, device=device)
    d = 8192 if device == "cuda" else 1024
    x, w = (torch.randn(d, d, dtype=dtype, device=device) for _ in range(2))

    def median(statement: str, **names) -> float:
        timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.3).median

    return Rates(2 * size / median("b.copy_(a)", a=a, b=torch.empty_like(a)), 2 * d**3 / median("x @ w", x=x, w=w))


@dataclass(frozen=True)
class Work:
    """The FLOPs and bytes of a piece of work."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.matrix, self.bytes / rates.copy)


def layer_work(M: int, K: int, N: int, R: int, itemsize: int, direction: str) -> Work:
    """The work of a frozen linear layer with branches of total rank R (0: none); each product moves a large tensor
    once.

    Forward: x Wᵀ, x̂ Ãᵀ, H B̃ᵀ onto y. Backward: dy W, dy B̃ with dyᵀ H in one reading of dy, dHᵀ x̂, dH Ã onto dx.
    """
    forward = Work(2 * M * N * K + 2 * M * R * (K + N), itemsize * (M * K + N * K + M * N + R * (K + N)))
    backward = Work(
        2 * M * N * K + 4 * M * R * (K + N), itemsize * (M * N + N * K + M * K + (M * K if R else 0) + 2 * R * (K + N))
    )
    both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "forward+backward": both}[direction]


def product_work(use: str, M: int, D: int, R: int, itemsize: int) -> Work:
    """The work of one kernel: shrink and reduce read (M, D) once; expand writes it, and reads it too where it adds.
    Each is one product with R columns, "reduce both" two. ``use`` starts with the kernel's name and contains "added"
    for an expand that adds.
    """
    large, products = M * D * (2 if "added" in use else 1), 2 if "both" in use else 1
    return Work(products * 2 * M * D * R, products * itemsize * (large + M * R + R * D))
