"""The shapes and dtypes of what CUDA operations save and allocate, where they differ from the CPU's.

The operations are patched by name. A TorchFunctionMode is off while backward recomputes a checkpointed layer, and a CPU
build of torch dispatches no fake tensors on "cuda".
"""

import math
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from multilora_fast.ops import equations, grouped
from multilora_fast.ops.backends import load, load_grouped


@contextmanager
def cuda_operations():
    """Inside, dropout saves a mask of one byte per element (a CPU saves it in x's dtype), and attention saves and
    allocates what FlashAttention-2 does, or memory-efficient attention in float32 or with a mask."""
    with patch.object(F, "dropout", _dropout), patch.object(F, "scaled_dot_product_attention", _attention):
        yield


def cublas_workspaces() -> int:
    """Bytes that PyTorch allocates for cuBLAS and cuBLASLt on this machine's GPU if it is a Hopper: 32 MiB each. 0 on
    other machines, where they were not measured."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return 2 * 32 * 2**20 if hopper else 0


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if p and training else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    grouped = key.shape[-3] != query.shape[-3]
    if grouped and (attn_mask is not None or query.dtype == torch.float32):  # only FlashAttention-2 groups queries
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    return FlashAttention.apply(query, key, value, attn_mask)


class FlashAttention(torch.autograd.Function):
    """The tensors of FlashAttention-2's forward and backward on a GPU, without values.

    (batch, heads, T, head_dim) in and out; the output is laid out as (batch, T, heads, head_dim).
    """

    @staticmethod
    def forward(ctx, query, key, value, mask):
        *batch, heads, T, _ = query.shape
        out = query.new_empty(*batch, T, heads, value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, sums)
        return out.transpose(-2, -3)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32)
        # With grouped queries, each query head writes its own dk and dv, which are then added.
        own = [t.new_empty(*query.shape[:-1], t.shape[-1]) for t in (key, value) if t.shape[-3] != query.shape[-3]]
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums, own
        return *gradients, None


@contextmanager
def kernels():
    """:func:`cuda_operations`, and the ops allocate what their Triton kernels do for dropout: a mask of one bit per
    element within a forward and within a backward."""
    products, experts = _packing(load("torch")), _packing(load_grouped("torch"))
    with (
        cuda_operations(),
        patch.object(equations, "load", lambda name: products),
        patch.object(grouped, "load_grouped", lambda name: experts),
    ):
        yield


def _packing(products: Any) -> Any:
    """torch's ``products``, whose ``draw`` allocates a packed mask that the others ignore."""
    return type(products)(**{name: _without_mask(f) for name, f in products._asdict().items()} | {"draw": _draw})


def _draw(seed: Tensor | None, M: int, K: int, p: float, dtype: torch.dtype) -> tuple[Tensor] | None:
    return (torch.empty(M, math.ceil(K / 32), dtype=torch.int32),) if p else None


def _without_mask(function):
    def called(*args, **kwargs):
        given = [None if isinstance(a, tuple) else a for a in args]
        return function(*given, **{k: None if isinstance(a, tuple) else a for k, a in kwargs.items()})

    return called
