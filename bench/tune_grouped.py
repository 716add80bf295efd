"""The uses of the experts' kernels that bench.tune times, in the functions of :mod:`bench.tune_uses`.

M is the mean of an expert's rows. The experts are those of Qwen3-30B-A3B, and the router picks them at random.
"""

import math
from dataclasses import dataclass

import torch

from bench.tune_uses import DTYPE, Launch, P
from multilora_fast.kernels.configs import cdiv
from multilora_fast.kernels.dropout import draw, dropout_mask
from multilora_fast.kernels.grouped_expand import grouped_expand
from multilora_fast.kernels.grouped_reduce import grouped_reduce, grouped_reduce_scaled
from multilora_fast.kernels.grouped_shrink import grouped_shrink
from multilora_fast.ops import grouped_torch
from multilora_fast.ops.grouped import route

GROUPED = tuple(f"grouped_{name}{use}" for name in ("shrink", "expand", "reduce") for use in ("", " dropout"))
EXPERTS, TAKEN = 128, 8
FEATURES = (2048, 768)
ROWS = {"8192": (512,), "decode": (16,)}  # of one expert, by the size classes of the table


@dataclass(frozen=True)
class Inputs:
    """Inputs for every use of one shape; instances share no tensor. S = M·E rows, of S/TAKEN tokens."""

    x: torch.Tensor  # (S/TAKEN, D)
    large: torch.Tensor  # (S, D): the rows of x, or dy
    y: torch.Tensor  # (S, D), zeros
    h: torch.Tensor  # (S, n·r)
    a: torch.Tensor  # (E, n, r, D)
    b: torch.Tensor  # (E, n, r, D), lora_B transposed
    scale: torch.Tensor  # (E, n, D)
    ids: torch.Tensor  # (S,)
    ends: torch.Tensor  # (E,)
    bits: torch.Tensor  # the mask of P, (S, ⌈D/32⌉)


def draw_inputs(M: int, D: int, n: int, r: int, dtype: torch.dtype = DTYPE, device: str = "cuda") -> Inputs:
    def make(*size):
        return torch.randn(*size, device=device, dtype=dtype)

    S, E = M * EXPERTS, EXPERTS
    ids, ends = route(torch.rand(S // TAKEN, E, device=device).topk(TAKEN).indices, E)
    a, b = make(E, n, r, D) / math.sqrt(D), make(E, n, D, r) / math.sqrt(r)
    y, bits = torch.zeros(S, D, device=device, dtype=dtype), draw(torch.tensor([1], device=device), S, D, P)
    x = make(S // TAKEN, D)
    return Inputs(x, make(S, D), y, make(S, n * r), a, b.transpose(2, 3), make(E, n, D), ids, ends, bits)


def empty_inputs(M: int, D: int, n: int, r: int, dtype: torch.dtype = DTYPE, device: str = "cuda") -> Inputs:
    """Uninitialized inputs of the same kind; no kernel runs."""

    def make(*size, dtype=dtype):
        return torch.empty(*size, device=device, dtype=dtype)

    S, E = M * EXPERTS, EXPERTS
    a, b, scale = make(E, n, r, D), make(E, n, D, r).transpose(2, 3), make(E, n, D)
    ids, ends = make(S, dtype=torch.int64), make(E, dtype=torch.int32)
    bits = make(S, cdiv(D, 32), dtype=torch.int32)
    return Inputs(make(S // TAKEN, D), make(S, D), make(S, D), make(S, n * r), a, b, scale, ids, ends, bits)


def launches(kernel: str, t: Inputs) -> dict[str, Launch]:
    """The uses that share a row of the table, by name. Each returns its result; expand returns ``t.y`` itself, to which
    it adds at every launch."""
    n, dtype = t.a.shape[1], t.large.dtype
    drop = {"ids": t.ids, "bits": t.bits, "p": P} if "dropout" in kernel else {}

    def expanded(w, scale=None):
        return lambda c: (grouped_expand(t.y, t.h, w, t.ends, scale, config=c, **drop), t.y)[1]

    def reduced(c):
        return grouped_reduce(t.h, t.x, t.ends, n, dtype, t.ids // TAKEN, config=c, **drop)

    match kernel:
        case "grouped_shrink":
            forward = lambda c: grouped_shrink(t.large, t.a, t.ends, config=c)  # noqa: E731
            return {"forward": forward, "backward": lambda c: grouped_shrink(t.large, t.b, t.ends, t.scale, config=c)}
        case "grouped_shrink dropout":
            return {"forward": lambda c: grouped_shrink(t.large, t.a, t.ends, config=c, **drop)}
        case "grouped_expand":
            return {"forward": expanded(t.b, t.scale), "backward": expanded(t.a)}
        case "grouped_expand dropout":
            return {"backward": expanded(t.a)}
        case "grouped_reduce":
            scaled = lambda c: grouped_reduce_scaled(t.h, t.large, t.b, t.ends, t.scale, config=c)[0]  # noqa: E731
            return {"forward": scaled, "backward": reduced}
        case "grouped_reduce dropout":
            return {"backward": reduced}
    raise ValueError(f"kernel is {kernel!r}, wanted one of {GROUPED}.")


def truths(kernel: str, t: Inputs) -> dict[str, torch.Tensor]:
    """The results of :func:`launches` on the same inputs, by torch in float32."""
    x, large, h, a, b, scale = (each.float() for each in (t.x, t.large, t.h, t.a, t.b, t.scale))
    ids, ends, n = t.ids, t.ends, a.shape[1]
    drop = {}
    if "dropout" in kernel:
        keep = dropout_mask(torch.tensor([1], device=x.device), *large.shape, P, torch.float32)
        drop = {"ids": ids, "bits": keep, "p": P}

    def expanded(w, scale=None):
        y = torch.zeros_like(large)
        grouped_torch.expand(y, h, w, ends, scale, **drop)
        return y

    match kernel.split()[0]:
        case "grouped_shrink":
            forward = grouped_torch.shrink(large, a, ends, **drop)
            return {"forward": forward, "backward": grouped_torch.shrink(large, b, ends, scale)}
        case "grouped_expand":
            return {"forward": expanded(b, scale), "backward": expanded(a)}
        case _:
            backward = grouped_torch.reduce(h, x, ends, n, torch.float32, ids // TAKEN, **drop)
            return {"forward": grouped_torch.reduce_scaled(h, large, b, ends, scale, 1.0)[0], "backward": backward}
