"""Which implementation of shrink, expand and reduce runs: the Triton kernels, or torch matmuls."""

import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from multilora_fast.ops import torch_backend


class Backend(NamedTuple):
    """``draw(seed, M, K, p, dtype)`` gives what the three products take for dropout: the Triton kernels regenerate the
    mask on the tile, from the seed; torch makes it once per forward and once per backward."""

    draw: Callable
    shrink: Callable
    expand: Callable
    reduce: Callable
    reduce_scaled: Callable
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
        return Backend(
            torch_backend.draw,
            torch_backend.shrink,
            torch_backend.expand,
            torch_backend.reduce,
            torch_backend.reduce_scaled,
            torch_backend.dropout_mask,
        )
    try:
        from multilora_fast.kernels.dropout import dropout_mask
        from multilora_fast.kernels.expand import expand
        from multilora_fast.kernels.reduce import reduce, reduce_scaled
        from multilora_fast.kernels.shrink import shrink
    except ImportError as error:
        raise ValueError(f'backend "triton" cannot be loaded ({error}): use backend="torch".') from error
    return Backend(lambda seed, *_: seed, shrink, expand, reduce, reduce_scaled, dropout_mask)
