"""Which implementation of shrink, expand and reduce runs: the Triton kernels, or torch matmuls."""

import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from multilora_fast.ops import grouped_torch, torch_backend


class Backend(NamedTuple):
    """``draw(seed, M, K, p, dtype)`` gives what the products take for dropout, made once per forward and once per
    backward: the mask as bits for the Triton kernels, as numbers in ``dtype`` for torch; None where nothing drops."""

    draw: Callable
    shrink: Callable
    expand: Callable
    linear: Callable
    layer: Callable
    multiply: Callable
    reduce: Callable
    reduce_scaled: Callable
    reduce_all: Callable  # both, from what they have in common
    dropout_mask: Callable


def choose(name: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend called ``name``, or for None "triton" on a CUDA device and "torch" elsewhere.

    Raises:
        ValueError: an unknown name, or Triton where it cannot run or compute in ``dtype``.
    """
    if name is None:
        name = "triton" if device.type == "cuda" else "torch"
    if name not in ("triton", "torch"):
        raise ValueError(f'backend must be "triton", "torch" or None, not {name!r}.')
    if name == "triton" and device.type not in ("cuda", "meta") and not interpreted():
        raise ValueError(
            f'backend "triton" needs a CUDA device (or TRITON_INTERPRET=1), but x is on {device}: use backend="torch".'
        )
    if name == "triton" and dtype == torch.float64 and device.type == "cuda":
        raise ValueError('backend "triton" does not compute in torch.float64 on a GPU: use backend="torch".')
    return name


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def load(name: str) -> Backend:
    """The functions of a backend that :func:`choose` named."""
    if name == "torch":
        return Backend(*(getattr(torch_backend, field) for field in Backend._fields))
    try:
        from multilora_fast.kernels.dropout import draw, dropout_mask
        from multilora_fast.kernels.expand import expand
        from multilora_fast.kernels.launch import multiply
        from multilora_fast.kernels.linear import layer, linear
        from multilora_fast.kernels.reduce import reduce, reduce_all, reduce_scaled
        from multilora_fast.kernels.shrink import shrink
    except ImportError as error:
        raise ValueError(f'backend "triton" cannot be loaded ({error}): use backend="torch".') from error
    bits = lambda seed, M, K, p, dtype: draw(seed, M, K, p)  # noqa: E731
    return Backend(bits, shrink, expand, linear, layer, multiply, reduce, reduce_scaled, reduce_all, dropout_mask)


class Grouped(NamedTuple):
    """The products of experts by one backend, with the signatures of :mod:`multilora_fast.ops.grouped_torch`."""

    draw: Callable
    shrink: Callable
    expand: Callable
    reduce: Callable
    reduce_scaled: Callable


@cache
def load_grouped(name: str) -> Grouped:
    if name == "torch":
        return Grouped(*(getattr(grouped_torch, field) for field in Grouped._fields))
    from multilora_fast.kernels.dropout import draw
    from multilora_fast.kernels.grouped_expand import grouped_expand
    from multilora_fast.kernels.grouped_reduce import grouped_reduce, grouped_reduce_scaled
    from multilora_fast.kernels.grouped_shrink import grouped_shrink

    bits = lambda seed, S, K, p, dtype: draw(seed, S, K, p)  # noqa: E731
    return Grouped(bits, grouped_shrink, grouped_expand, grouped_reduce, grouped_reduce_scaled)
