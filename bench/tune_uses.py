"""The uses of the kernels that bench.tune times: rotating inputs, launches, and float32 results."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from multilora_fast.kernels.configs import KernelConfig, cdiv
from multilora_fast.kernels.dropout import draw, dropout_mask
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.reduce import reduce, reduce_all
from multilora_fast.kernels.shrink import shrink
from multilora_fast.ops.torch_backend import inverse_keep

P = 0.05
# As named in the table: the kernel, whether expand adds to y, and whether there is a mask.
KERNELS = (
    "shrink", "shrink dropout", "expand", "expand add", "expand dropout", "expand add dropout", "reduce",
    "reduce dropout",
)  # fmt: skip
LAYER = 160  # the widest rank of one layer; wider ones are those of layers that share x
DTYPE = torch.bfloat16
Launch = Callable[[KernelConfig], torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    """Inputs for every use of one shape; instances share no tensor."""

    large: torch.Tensor  # (M, D): x or dy
    other: torch.Tensor  # (M, D): dy where large is x
    y: torch.Tensor  # (M, D), zeros
    h: torch.Tensor  # (M, n·r)
    a: torch.Tensor  # (n, r, D)
    b: torch.Tensor  # (n, r, D), lora_B transposed
    scale: torch.Tensor  # (n, D)
    bits: torch.Tensor  # the mask of P, (M, ⌈D/32⌉)


def draw_inputs(M: int, D: int, n: int, r: int, dtype: torch.dtype = DTYPE, device: str = "cuda") -> Inputs:
    def make(*size):
        return torch.randn(*size, device=device, dtype=dtype)

    a, b = make(n, r, D) / math.sqrt(D), make(n, D, r) / math.sqrt(r)
    bits = draw(torch.tensor([1], device=device), M, D, P)
    y = torch.zeros(M, D, device=device, dtype=dtype)
    return Inputs(make(M, D), make(M, D), y, make(M, n * r), a, b.transpose(1, 2), make(n, D), bits)


def empty_inputs(M: int, D: int, n: int, r: int, dtype: torch.dtype = DTYPE, device: str = "cuda") -> Inputs:
    """Uninitialized inputs of the same kind; no kernel runs."""

    def make(*size, dtype=dtype):
        return torch.empty(*size, device=device, dtype=dtype)

    b = make(n, D, r).transpose(1, 2)
    bits = make(M, cdiv(D, 32), dtype=torch.int32)
    return Inputs(make(M, D), make(M, D), make(M, D), make(M, n * r), make(n, r, D), b, make(n, D), bits)


def launches(kernel: str, t: Inputs) -> dict[str, Launch]:
    """The uses that share a row of the table, by name. Each returns its result; expand returns ``t.y`` itself, and
    "expand add" adds to it at every launch. reduce sums both gradients of a layer, and dA alone at ranks of several.
    """
    (n, r, _), dtype = t.a.shape, t.large.dtype
    dropout = {"bits": t.bits, "p": P} if "dropout" in kernel else {}

    def expanded(w, scale=None, dropout=dropout):
        accumulate = "add" in kernel
        return lambda c: (expand(t.y, t.h, w, scale, accumulate=accumulate, config=c, **dropout), t.y)[1]

    def reduced(c):
        if n * r > LAYER:
            return reduce(t.h, t.large, n, dtype, config=c, **dropout)
        return reduce_all(t.h, t.other, t.b, t.scale, 1.0, t.h, t.large, dtype, config=c, **dropout)

    match kernel:
        case "shrink":
            forward = lambda c: shrink(t.large, t.a, config=c)  # noqa: E731
            return {"forward": forward, "backward": lambda c: shrink(t.large, t.b, t.scale, config=c)}
        case "shrink dropout":
            return {"forward": lambda c: shrink(t.large, t.a, config=c, **dropout)}
        case "expand":
            return {"forward": expanded(t.b, t.scale), "backward": expanded(t.a)}
        case "expand add":
            return {"forward": expanded(t.b, t.scale)}
        case "expand dropout" | "expand add dropout":
            return {"backward": expanded(t.a)}
        case "reduce" | "reduce dropout":
            return {"backward": reduced}
    raise ValueError(f"kernel is {kernel!r}, wanted one of {KERNELS}.")


def truths(kernel: str, t: Inputs) -> dict[str, torch.Tensor]:
    """The results of :func:`launches` on the same inputs, by torch in float32; reduce's one after the other, flat."""
    (n, r, D), M = t.a.shape, t.large.shape[0]
    large, other, h, a, b, scale = (x.float() for x in (t.large, t.other, t.h, t.a.flatten(0, 1), t.b, t.scale))
    packed, keep = (scale[:, None] * b).flatten(0, 1), 1.0
    if "dropout" in kernel:
        seed = torch.tensor([1], device=large.device)
        keep = dropout_mask(seed, M, D, P) * inverse_keep(P)
    match kernel.split()[0]:
        case "shrink":
            return {"forward": (keep * large) @ a.T, "backward": large @ packed.T}
        case "expand":
            return {"forward": h @ packed, "backward": keep * (h @ a)}
        case _:
            dA, summed = h.T @ (keep * large), (h.T @ other).reshape(n, r, D)
            parts = (dA,) if n * r > LAYER else (scale[:, :, None] * summed.mT, (b * summed).sum(1), dA)  # dB, ds, dA
            return {"backward": torch.cat([part.flatten() for part in parts])}


def correct(kernel: str, launch: Launch, config: KernelConfig, truth: torch.Tensor) -> bool:
    """Whether one launch is within 1 % of float32. The target of an adding expand starts at zero."""
    if "add" in kernel or "grouped_expand" in kernel:
        launch(config).zero_()
    return near(launch(config), truth)


def near(found: torch.Tensor | tuple[torch.Tensor, ...], truth: torch.Tensor) -> bool:
    """Whether ‖found − truth‖ is within 1 % of ‖truth‖, for each of several results in a flat truth."""
    if truth.dim() == 1:
        several = found if isinstance(found, tuple) else (found,)
        parts = truth.split([part.numel() for part in several])
        return all(near(part, one.view(part.shape)) for part, one in zip(several, parts, strict=True))
    assert isinstance(found, torch.Tensor)
    return bool((found.float() - truth).norm() <= 0.01 * truth.norm())
