"""The implementations of shrink, expand and reduce: Triton kernels, or torch matmuls."""

import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from multilora_fast.ops import grouped_torch, torch_backend


class Backend(NamedTuple):
    """The products of one backend. ``draw(seed, M, K, p, dtype)`` returns the dropout mask they take, as bits for the
    Triton kernels and as numbers in ``dtype`` for torch, or None where nothing is dropped."""

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
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "triton" and device.type not in ("cuda", "meta") and not interpreted:
        raise ValueError(
            f'backend "triton" needs a CUDA device (or TRITON_INTERPRET=1), but x is on {device}: use backend="torch".'
        )
    if name == "triton" and dtype == torch.float64 and device.type == "cuda":
        raise ValueError('backend "triton" does not compute in torch.float64 on a GPU: use backend="torch".')
    return name


@cache
def load(name: str) -> Backend:
    """The products of the backend ``name``, "triton" or "torch"."""
    if name == "torch":
        return Backend(*(getattr(torch_backend, field) for field in Backend._fields))
    try:
        from multilora_fast.kernels import dropout, expand, launch, linear, reduce, shrink
    except ImportError as error:
        raise ValueError(f'backend "triton" cannot be loaded ({error}): use backend="torch".') from error
    return Backend(
        _bits, shrink.shrink, expand.expand, linear.linear, linear.layer, launch.multiply,
        reduce.reduce, reduce.reduce_scaled, reduce.reduce_all, dropout.dropout_mask,
    )  # fmt: skip


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
    from multilora_fast.kernels import grouped_expand, grouped_reduce, grouped_shrink

    return Grouped(
        _bits, grouped_shrink.grouped_shrink, grouped_expand.grouped_expand,
        grouped_reduce.grouped_reduce, grouped_reduce.grouped_reduce_scaled,
    )  # fmt: skip


def _bits(seed, M: int, K: int, p: float, dtype: torch.dtype):
    from multilora_fast.kernels.dropout import draw

    return draw(seed, M, K, p)
