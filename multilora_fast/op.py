"""The op: y = x Wᵀ + b + Σᵢ c·sᵢ ⊙ Bᵢ Aᵢ dropout(x), forward and backward.

M tokens, K in_features, N out_features, n branches of rank r, R = n·r, c the constant scaling factor. Ã (R, K) is
the branches' A below each other, B̃ (N, R) the branches' c·sᵢ ⊙ Bᵢ beside each other, x̂ = dropout(x) with one mask.

    H  = x̂ Ãᵀ                 shrink        dH = dy B̃                          shrink
    y  = x Wᵀ + b + H B̃ᵀ      expand        dx = dy W + mask/(1−p) ⊙ (dH Ã)    expand
                                            dÃ = dHᵀ x̂                         reduce
    P = dyᵀ H, dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ)                        reduce, epilogue

Saved for backward: x as it came or in 8 bits, H (M, R), the seed of the mask, and the parameters. Everything else, the
mask and a cast of x under autocast included, is made again.

The op is two halves, which `shared` runs apart: what reads x, dropout and Ã, and what reads H, B̃ and W.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from multilora_fast import selfcheck
from multilora_fast.backends import Backend, load
from multilora_fast.checks import check_base
from multilora_fast.inputs import Kept, keep, read


class Settings(NamedTuple):
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

    def kept_H(self, H: Tensor) -> Tensor | None:
        return H if self.lora_B or self.lora_scaling else None

    def kept_x(self, x: Tensor, settings: Settings) -> Kept:
        return keep(x if self.lora_A or self.weight else None, "exact" if self.weight else settings.save_inputs)


def project(x: Tensor, lora_A: Tensor, seed: Tensor | None, settings: Settings) -> Tensor:
    """H (M, R), the input's half of the forward."""
    _, p, dtype = settings[:3]
    tokens = rows(x.to(dtype))
    ops = _products("forward", tokens, lora_A, settings)
    return ops.shrink(tokens, lora_A, None, 1.0, ops.draw(seed, *tokens.shape, p, dtype), p)


def finish(x, y, weight, bias, H, lora_B, lora_scaling, settings: Settings) -> Tensor:
    """The output (..., N), the output's half of the forward. Exactly one of y, the base layer's output, and weight is
    given."""
    c, _, dtype = settings[:3]
    if y is None:
        y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    else:
        y = y.clone(memory_format=torch.contiguous_format)
    out, w = rows(y), lora_B.transpose(1, 2)
    _products("forward", H, w, settings).expand(out, H, w, _per_column(lora_scaling, w), c)
    return out.view(y.shape)


def finish_backward(dy, x, H, lora_B, lora_scaling, settings: Settings, needs: Needs) -> tuple:
    """From dy (M, N): dW, db, dB, ds, and dH where ``needs`` has x or lora_A. ``x`` is read for dW alone."""
    c, _, dtype = settings[:3]
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
        dw = dy.t() @ rows(x.to(dtype))
    if needs.bias:
        db = dy.sum(0)
    return dw, db, dB, ds, dH


def project_backward(dH, x: Kept, dx, lora_A, seed, settings: Settings, needs: Needs) -> tuple:
    """From dH (M, R): the branches' part of dx (M, K), added to ``dx`` in place if it is given, and dÃ as (n, r, K)."""
    _, p, dtype = settings[:3]
    ops, dA = _products("backward", dH, lora_A, settings), None
    n, _, K = lora_A.shape
    mask = ops.draw(seed, dH.shape[0], K, p, dtype)
    if needs.x:
        given = dx is not None
        dx = dx if given else dH.new_empty(dH.shape[0], K)
        ops.expand(dx, dH, lora_A, None, 1.0, mask, p, accumulate=given)
    if needs.lora_A:
        dA = ops.reduce(dH, rows(read(x, dtype)), n, lora_A.dtype, mask, p)
    return dx, dA


def _products(direction: str, tokens: Tensor, w: Tensor, settings: Settings) -> Backend:
    """The backend's products; on a GPU the kernels are tried once before they are trusted."""
    if settings.backend == "triton" and tokens.is_cuda:
        selfcheck.check(direction, tokens, w, settings)
    return load(settings.backend)


def forward(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, settings: Settings) -> tuple[Tensor, Tensor]:
    """The output (..., N), and H (M, R)."""
    H = project(x, lora_A, seed, settings)
    return finish(x, y, weight, bias, H, lora_B, lora_scaling, settings), H


def backward(dy, x: Kept, H, weight, lora_A, lora_B, lora_scaling, seed, settings: Settings, needs: Needs) -> list:
    """The gradients in the order of ``needs``, None where none is needed."""
    tokens = rows(dy.to(settings.dtype))
    dw, db, dB, ds, dH = finish_backward(tokens, x.x, H, lora_B, lora_scaling, settings, needs)
    dx: Any = None
    dA: Any = None
    if needs.x or needs.lora_A:
        dx, dA = project_backward(dH, x, None, lora_A, seed, settings, needs)
    if needs.x:
        if weight is not None:
            dx.addmm_(tokens, weight.to(settings.dtype))
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    grads = Needs(dx, dw, db, dA, dB, ds)
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


class MultiLoRA(torch.autograd.Function):
    """The op as eager calls take it. ``weight`` may be a function that returns the dense weight."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, settings):
        ctx.dense, ctx.settings, ctx.needs = weight if callable(weight) else None, settings, Needs.of(ctx)
        with no_autocast(x.device.type):
            dense = dense_weight(weight, x, bias, lora_B)
            out, H = forward(x, y, dense, bias, lora_A, lora_B, lora_scaling, seed, settings)
        kept = (*ctx.needs.kept_x(x, settings), ctx.needs.kept_H(H), None if callable(weight) else weight)
        ctx.save_for_backward(*kept, lora_A, lora_B, lora_scaling, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, scale, H, weight, *rest = ctx.saved_tensors
        with no_autocast(dy.device.type):
            if ctx.dense is not None and ctx.needs.x:
                weight = ctx.dense()
            dx, *grads = backward(dy, Kept(x, scale), H, weight, *rest, ctx.settings, ctx.needs)
        return dx, dy if ctx.needs_input_grad[1] else None, *grads, None, None


def rows(t: Tensor) -> Tensor:
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
    with no_autocast(x.device.type):
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
    with no_autocast(dy.device.type):
        grads = backward(dy, Kept(x), H, weight, lora_A, lora_B, lora_scaling, seed, settings, Needs(*needs))
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
    kept = ctx.needs.kept_x(x, Settings(*ctx.settings)).x
    ctx.save_for_backward(kept, ctx.needs.kept_H(output[1]), weight, *rest)


def _compiled_backward(ctx, dy, _):
    grads = iter(compiled_backward(dy, *ctx.saved_tensors, *ctx.settings, ctx.needs))
    dx, *others = (next(grads) if needed else None for needed in ctx.needs)
    return dx, dy if ctx.needs_input_grad[1] else None, *others, *[None] * 5


compiled.register_autograd(_compiled_backward, setup_context=_setup)
