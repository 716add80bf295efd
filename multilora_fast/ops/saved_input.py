"""The input saved for backward: x itself, or x in 8 bits where nothing else saves it.

Only dÃ = dHᵀ x̂ reads x in backward, so rounding affects no other gradient: dx, dB and ds stay exact.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_VIEWS = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "TransposeBackward", "PermuteBackward")


def save_input(x: Tensor | None, save_inputs: str) -> tuple[Tensor | None, Tensor | None]:
    """What to save of x (..., K) under "exact" or "fp8": x and None, or its e4m3 values and the power of two that
    scales each token, (..., 1)."""
    if x is None or save_inputs == "exact" or x.numel() == 0 or _kept_anyway(x):
        return x, None
    largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).float()
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest / torch.finfo(_FP8).max).exponent)
    scale.clamp_(min=torch.finfo(x.dtype).smallest_normal)  # float16 would flush a smaller one to zero
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (x / scale.to(x.dtype)).to(_FP8), scale


def restore(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x as (M, K) in ``dtype``, from what :func:`save_input` returned."""
    return as_tokens(x if scale is None else x.to(dtype).mul_(scale), dtype)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, without its microsecond where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def cast_all(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors]


def as_tokens(t: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., D) as (M, D) in ``dtype``, copied only where it must be."""
    if t.dtype is not dtype:
        t = t.to(dtype)
    return t if t.ndim == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _kept_anyway(x: Tensor) -> bool:
    """Whether the operation that made x saves it for its own backward, as attention kernels save their output."""
    node = x.grad_fn
    while node is not None and node.name().startswith(_VIEWS):
        node = node.next_functions[0][0]
    return node is not None and "Attention" in node.name()
