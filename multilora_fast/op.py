"""The op: y = x Wᵀ + b + Σᵢ c·sᵢ ⊙ Bᵢ Aᵢ dropout(x), forward and backward.

M tokens, K in_features, N out_features, n branches of rank r, R = n·r, c the constant scaling factor. Ã (R, K) is
the branches' A below each other, B̃ (N, R) the branches' c·sᵢ ⊙ Bᵢ beside each other, x̂ = dropout(x) with one mask.

    H  = x̂ Ãᵀ                 shrink        dH = dy B̃                          shrink
    y  = x Wᵀ + b + H B̃ᵀ      expand        dx = dy W + mask/(1−p) ⊙ (dH Ã)    expand
                                            dÃ = dHᵀ x̂                         reduce
    P = dyᵀ H, dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ)                        reduce, epilogue

Saved for backward: x as it came, H (M, R), the seed of the mask, and the parameters. Everything else, the mask and a
cast of x under autocast included, is made again.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from multilora_fast import selfcheck
from multilora_fast.backends import load


class Settings(NamedTuple):
    scaling_factor: float
    dropout_p: float
    dtype: torch.dtype  # of the products: x's, or autocast's
    backend: str


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

    def keep(self, x: Tensor, H: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What backward will read of x and H."""
        return x if self.lora_A or self.weight else None, H if self.lora_B or self.lora_scaling else None


def forward(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, settings: Settings) -> tuple[Tensor, Tensor]:
    """The output (..., N), and H (M, R). Exactly one of y, the base layer's output, and weight is given."""
    c, p, dtype, backend = settings
    ops = load(backend)
    x = x.to(dtype)
    tokens = _tokens(x)
    if backend == "triton" and x.is_cuda:
        selfcheck.check("forward", x, lora_A, settings, tokens.shape[0])
    H = ops.shrink(tokens, lora_A, None, 1.0, ops.draw(seed, *tokens.shape, p, dtype), p)
    if y is None:
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    else:
        y = y.clone(memory_format=torch.contiguous_format)
    out = _tokens(y)
    w = lora_B.transpose(1, 2)
    ops.expand(out, H, w, _per_column(lora_scaling, w), c)
    return out.view(y.shape), H


def backward(dy, x, H, weight, lora_A, lora_B, lora_scaling, seed, settings: Settings, needs: Needs) -> list:
    """The gradients in the order of ``needs``, None where none is needed."""
    c, p, dtype, backend = settings
    ops = load(backend)
    n, _, K = lora_A.shape
    w = lora_B.transpose(1, 2)
    scale = _per_column(lora_scaling, w)
    tokens = _tokens(dy.to(dtype))
    if x is not None:
        x = _tokens(x.to(dtype))
    if backend == "triton" and dy.is_cuda:
        selfcheck.check("backward", dy, lora_A, settings, tokens.shape[0])

    dx = dw = db = dA = dB = ds = None
    if needs.lora_B or needs.lora_scaling:
        dB, ds = ops.reduce_scaled(H, tokens, w, scale, c)
        if lora_scaling.shape[1] == 1:
            ds = ds.sum(1, keepdim=True)
    if needs.x or needs.lora_A:
        dH = ops.shrink(tokens, w, scale, c)
        mask = ops.draw(seed, tokens.shape[0], K, p, dtype)
    if needs.x:
        dx = tokens.new_zeros(tokens.shape[0], K) if weight is None else tokens @ weight.to(dtype)
        ops.expand(dx, dH, lora_A, None, 1.0, mask, p)
        dx = dx.view(*dy.shape[:-1], K)
    if needs.lora_A:
        dA = ops.reduce(dH, x, n, lora_A.dtype, mask, p)
    if needs.weight:
        dw = tokens.t() @ x
    if needs.bias:
        db = tokens.sum(0)
    grads = Needs(dx, dw, db, dA, dB, ds)
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


class MultiLoRA(torch.autograd.Function):
    """The op as eager calls take it. ``weight`` may be a function that returns the dense weight."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, settings):
        ctx.dense, ctx.settings, ctx.needs = weight if callable(weight) else None, settings, Needs.of(ctx)
        with _no_autocast(x.device.type):
            dense = weight() if callable(weight) else weight
            out, H = forward(x, y, dense, bias, lora_A, lora_B, lora_scaling, seed, settings)
        kept = None if callable(weight) else weight
        ctx.save_for_backward(*ctx.needs.keep(x, H), kept, lora_A, lora_B, lora_scaling, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, H, weight, *rest = ctx.saved_tensors
        with _no_autocast(dy.device.type):
            if ctx.dense is not None and ctx.needs.x:
                weight = ctx.dense()
            dx, *grads = backward(dy, x, H, weight, *rest, ctx.settings, ctx.needs)
        return dx, dy if ctx.needs_input_grad[1] else None, *grads, None, None


def _tokens(t: Tensor) -> Tensor:
    """(..., D) as (M, D): a view where the strides allow it."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _per_column(lora_scaling: Tensor, w: Tensor) -> Tensor:
    return lora_scaling.expand(w.shape[0], w.shape[2])


def _no_autocast(kind: str):
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


# The same op for torch.compile, which keeps it whole in its graph. A library call costs more than the eager Function,
# so only compilation takes this way.


@torch.library.custom_op("multilora_fast::multilora", mutates_args=())
def compiled(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_scaling: Tensor,
    seed: Tensor | None,
    scaling_factor: float,
    dropout_p: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    settings = Settings(scaling_factor, dropout_p, dtype, backend)
    with _no_autocast(x.device.type):
        return forward(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, settings)


@compiled.register_fake
def _(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, scaling_factor, dropout_p, dtype, backend):
    n, r, _ = lora_A.shape
    out = x.new_empty(*x.shape[:-1], lora_B.shape[1], dtype=dtype if y is None else y.dtype)
    return out, x.new_empty(x.shape[:-1].numel(), n * r, dtype=dtype)


@torch.library.custom_op("multilora_fast::multilora_backward", mutates_args=())
def compiled_backward(
    dy: Tensor,
    x: Tensor | None,
    H: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_scaling: Tensor,
    seed: Tensor | None,
    scaling_factor: float,
    dropout_p: float,
    dtype: torch.dtype,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    settings = Settings(scaling_factor, dropout_p, dtype, backend)
    with _no_autocast(dy.device.type):
        grads = backward(dy, x, H, weight, lora_A, lora_B, lora_scaling, seed, settings, Needs(*needs))
    return [grad for grad in grads if grad is not None]


@compiled_backward.register_fake
def _(dy, x, H, weight, lora_A, lora_B, lora_scaling, seed, scaling_factor, dropout_p, dtype, backend, needs):
    K, N = lora_A.shape[2], lora_B.shape[1]
    grads = Needs(
        x=dy.new_empty(*dy.shape[:-1], K, dtype=dtype),
        weight=dy.new_empty(N, K, dtype=dtype),
        bias=dy.new_empty(N, dtype=dtype),
        lora_A=torch.empty_like(lora_A, memory_format=torch.contiguous_format),
        lora_B=torch.empty_like(lora_B, memory_format=torch.contiguous_format),
        lora_scaling=torch.empty_like(lora_scaling, memory_format=torch.contiguous_format),
    )
    return [grad for grad, needed in zip(grads, needs, strict=True) if needed]


def _setup(ctx, inputs, output):
    x, _, weight, _, *rest, scaling_factor, dropout_p, dtype, backend = inputs
    ctx.needs, ctx.settings = Needs.of(ctx), (scaling_factor, dropout_p, dtype, backend)
    ctx.save_for_backward(*ctx.needs.keep(x, output[1]), weight, *rest)


def _compiled_backward(ctx, dy, _):
    grads = iter(compiled_backward(dy, *ctx.saved_tensors, *ctx.settings, ctx.needs))
    dx, *others = (next(grads) if needed else None for needed in ctx.needs)
    return dx, dy if ctx.needs_input_grad[1] else None, *others, *[None] * 5


compiled.register_autograd(_compiled_backward, setup_context=_setup)
