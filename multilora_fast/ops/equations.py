"""The op: y = x Wᵀ + b + Σᵢ c·sᵢ ⊙ Bᵢ Aᵢ dropout(x), forward and backward.

M tokens, K in_features, N out_features, n branches of rank r, R = n·r, c the constant scaling factor. Ã (R, K) is
the branches' A below each other, B̃ (N, R) the branches' c·sᵢ ⊙ Bᵢ beside each other, x̂ = dropout(x) with one mask.

    H  = x̂ Ãᵀ                 shrink        dH = dy B̃                          shrink
    y  = x Wᵀ + b + H B̃ᵀ      expand        dx = dy W + mask/(1−p) ⊙ (dH Ã)    expand
                                            dÃ = dHᵀ x̂                         reduce
    P = dyᵀ H, dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ)                        reduce, epilogue

Saved for backward: x as it came or in 8 bits, H (M, R), the seed of the mask, and the parameters. Everything else, the
mask and a cast of x under autocast included, is made again.

The op is two halves, which run apart for layers that share an input: what reads x, dropout and Ã, and what reads H, B̃
and W.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from multilora_fast.ops import selfcheck
from multilora_fast.ops.backends import Backend, load
from multilora_fast.ops.checks import check_base
from multilora_fast.ops.saved_input import SavedInput, restore, save_input


class OpSettings(NamedTuple):
    scaling_factor: float
    dropout_p: float
    dtype: torch.dtype  # of the products: x's, or autocast's
    backend: str
    save_inputs: str = "exact"


class Needs(NamedTuple):
    """Which inputs want a gradient from :func:`backward`."""

    x: bool
    weight: bool
    bias: bool
    lora_A: bool
    lora_B: bool
    lora_scaling: bool

    @classmethod
    def of(cls, ctx) -> "Needs":
        x, _, *rest = ctx.needs_input_grad[:7]
        return cls(x, *rest)

    def saved_H(self, H: Tensor) -> Tensor | None:
        return H if self.lora_B or self.lora_scaling else None

    def saved_x(self, x: Tensor, settings: OpSettings) -> SavedInput:
        return save_input(x if self.lora_A or self.weight else None, "exact" if self.weight else settings.save_inputs)


def shrink_forward(x: Tensor, lora_A: Tensor, seed: Tensor | None, settings: OpSettings) -> Tensor:
    """H (M, R), the input's half of the forward."""
    p, dtype = settings.dropout_p, settings.dtype
    tokens = flatten_tokens(x.to(dtype))
    ops = _products("forward", tokens, lora_A, settings)
    return ops.shrink(tokens, lora_A, None, 1.0, ops.draw(seed, *tokens.shape, p, dtype), p)


def expand_forward(x, y, weight, bias, H, lora_B, lora_scaling, settings: OpSettings) -> Tensor:
    """The output (..., N), the output's half of the forward. Exactly one of y, the base layer's output, and weight is
    given."""
    c, dtype = settings.scaling_factor, settings.dtype
    if y is None:
        y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    else:
        y = y.clone(memory_format=torch.contiguous_format)
    out, w = flatten_tokens(y), lora_B.transpose(1, 2)
    _products("forward", H, w, settings).expand(out, H, w, _per_column(lora_scaling, w), c)
    return out.view(y.shape)


def expand_backward(dy, x, H, lora_B, lora_scaling, settings: OpSettings, needs: Needs) -> tuple:
    """From dy (M, N): dW, db, dB, ds, and dH where ``needs`` has x or lora_A. ``x`` is read for dW alone."""
    c, dtype = settings.scaling_factor, settings.dtype
    w = lora_B.transpose(1, 2)
    ops, scale = _products("backward", dy, w, settings), _per_column(lora_scaling, w)
    dw = db = dB = ds = dH = None
    if needs.lora_B or needs.lora_scaling:
        dB, ds = ops.reduce_scaled(H, dy, w, scale, c)
        if lora_scaling.shape[1] == 1:
            ds = ds.sum(1, keepdim=True)
        ds = ds.to(lora_scaling.dtype).contiguous()
    if needs.x or needs.lora_A:
        dH = ops.shrink(dy, w, scale, c)
    if needs.weight:
        dw = dy.t() @ flatten_tokens(x.to(dtype))
    if needs.bias:
        db = dy.sum(0)
    return dw, db, dB, ds, dH


def shrink_backward(dH, x: SavedInput, dx, lora_A, seed, settings: OpSettings, needs: Needs) -> tuple:
    """From dH (M, R): the branches' part of dx (M, K), added to ``dx`` in place if it is given, and dÃ as (n, r, K)."""
    p, dtype = settings.dropout_p, settings.dtype
    ops, dA = _products("backward", dH, lora_A, settings), None
    n, _, K = lora_A.shape
    mask = ops.draw(seed, dH.shape[0], K, p, dtype)
    if needs.x:
        given = dx is not None
        dx = dx if given else dH.new_empty(dH.shape[0], K)
        ops.expand(dx, dH, lora_A, None, 1.0, mask, p, accumulate=given)
    if needs.lora_A:
        dA = ops.reduce(dH, flatten_tokens(restore(x, dtype)), n, lora_A.dtype, mask, p)
    return dx, dA


def _products(direction: str, tokens: Tensor, w: Tensor, settings: OpSettings) -> Backend:
    """The backend's products; on a GPU the kernels are tried once before they are trusted."""
    if settings.backend == "triton" and tokens.is_cuda:
        selfcheck.check(direction, tokens, w, settings)
    return load(settings.backend)


def forward(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, settings: OpSettings) -> tuple[Tensor, Tensor]:
    """The output (..., N), and H (M, R)."""
    H = shrink_forward(x, lora_A, seed, settings)
    return expand_forward(x, y, weight, bias, H, lora_B, lora_scaling, settings), H


def backward(
    dy, x: SavedInput, H, weight, lora_A, lora_B, lora_scaling, seed, settings: OpSettings, needs: Needs
) -> list:
    """The gradients in the order of ``needs``, None where none is needed."""
    tokens = flatten_tokens(dy.to(settings.dtype))
    dw, db, dB, ds, dH = expand_backward(tokens, x.x, H, lora_B, lora_scaling, settings, needs)
    dx: Any = None
    dA: Any = None
    if needs.x or needs.lora_A:
        dx, dA = shrink_backward(dH, x, None, lora_A, seed, settings, needs)
    if needs.x:
        if weight is not None:
            dx.addmm_(tokens, weight.to(settings.dtype))
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    grads = Needs(dx, dw, db, dA, dB, ds)
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def flatten_tokens(t: Tensor) -> Tensor:
    """(..., D) as (M, D): a view where the strides allow it."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def dense_weight(weight, x, bias, lora_B) -> Tensor | None:
    """``weight`` itself, or what it returns as a function, checked as a tensor is before."""
    if not callable(weight):
        return weight
    found = weight()
    check_base(x, found, bias, lora_B.shape[1], autocast=True)  # the product casts it
    return found


def _per_column(lora_scaling: Tensor, w: Tensor) -> Tensor:
    return lora_scaling.expand(w.shape[0], w.shape[2])


def no_autocast(kind: str):
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known and torch.is_autocast_enabled(kind) else nullcontext()
