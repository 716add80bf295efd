"""The autograd Functions: the op whole, and its two halves apart for layers that share an input."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from multilora_fast.ops.equations import (
    Needs,
    backward,
    dense_weight,
    expand_backward,
    expand_forward,
    flatten_tokens,
    forward,
    no_autocast,
    shrink_backward,
    shrink_forward,
)
from multilora_fast.ops.saved_input import SavedInput

_NOTHING = Needs(*[False] * 6)


class MultiLoRAFunction(torch.autograd.Function):
    """The op as eager calls take it. ``weight`` may be a function that returns the dense weight."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, settings):
        ctx.dense, ctx.settings, ctx.needs = weight if callable(weight) else None, settings, Needs.of(ctx)
        with no_autocast(x.device.type):
            dense = dense_weight(weight, x, bias, lora_B)
            out, H = forward(x, y, dense, bias, lora_A, lora_B, lora_scaling, seed, settings)
        kept = (*ctx.needs.saved_x(x, settings), ctx.needs.saved_H(H), None if callable(weight) else weight)
        ctx.save_for_backward(*kept, lora_A, lora_B, lora_scaling, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, scale, H, weight, *rest = ctx.saved_tensors
        with no_autocast(dy.device.type):
            if ctx.dense is not None and ctx.needs.x:
                weight = ctx.dense()
            dx, *grads = backward(dy, SavedInput(x, scale), H, weight, *rest, ctx.settings, ctx.needs)
        return dx, dy if ctx.needs_input_grad[1] else None, *grads, None, None


def _beside(lora_As: Sequence[Tensor]) -> Tensor:
    """All branches of all layers as one of rank Σ Rᵢ, (1, Σ Rᵢ, K)."""
    return torch.cat([A.flatten(0, 1) for A in lora_As])[None]


class SharedShrinkFunction(torch.autograd.Function):
    """x itself, and the H (M, Rᵢ) of every layer of a group, as slices of one tensor.

    The layers take the x that comes out: the sum of their dy W comes back here, and grows in place.
    """

    @staticmethod
    def forward(ctx, x, seed, settings, *lora_As):
        ctx.set_materialize_grads(False)
        x_needed, _, _, *A_needed = ctx.needs_input_grad
        ctx.settings, ctx.needs = settings, _NOTHING._replace(x=x_needed, lora_A=any(A_needed))
        with no_autocast(x.device.type):
            H = shrink_forward(x, _beside(lora_As), seed, settings)
        ctx.shape = x.shape
        ctx.save_for_backward(*ctx.needs.saved_x(x, settings), seed, *lora_As)
        return x, *H.split([A.shape[:2].numel() for A in lora_As], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, *dHs):
        x, scale, seed, *lora_As = ctx.saved_tensors
        given = next((dH for dH in dHs if dH is not None), None)
        if given is None:
            return dx, None, None, *[None] * len(lora_As)
        sizes = [A.shape[:2].numel() for A in lora_As]
        whole = torch.cat(
            [given.new_zeros(len(given), R) if dH is None else dH for dH, R in zip(dHs, sizes, strict=True)], 1
        )
        with no_autocast(whole.device.type):
            grows = dx is not None and dx.dtype == ctx.settings.dtype  # it is wider under autocast
            own = flatten_tokens(dx) if grows else None
            own, dA = shrink_backward(whole, SavedInput(x, scale), own, _beside(lora_As), seed, ctx.settings, ctx.needs)
            if own is not None:
                own = own.view(ctx.shape)
                dx = own if grows or dx is None else dx.add_(own)
        grads = [None] * len(lora_As) if dA is None else dA[0].split(sizes)
        dAs = (
            g.view(A.shape) if needed and dH is not None else None
            for g, A, dH, needed in zip(grads, lora_As, dHs, ctx.needs_input_grad[3:], strict=True)
        )
        return dx, None, None, *dAs


class ExpandFunction(torch.autograd.Function):
    """The rest of a layer whose H is given. ``weight`` may be a function that returns the dense weight."""

    @staticmethod
    def forward(ctx, x, y, weight, bias, H, lora_B, lora_scaling, settings):
        ctx.dense, ctx.settings = weight if callable(weight) else None, settings
        x_needed, ctx.y_needed, w_needed, b_needed, H_needed, B_needed, s_needed, _ = ctx.needs_input_grad
        ctx.needs = Needs(x_needed, w_needed, b_needed, H_needed, B_needed, s_needed)
        with no_autocast(x.device.type):
            dense = dense_weight(weight, x, bias, lora_B)
            out = expand_forward(x, y, dense, bias, H, lora_B, lora_scaling, settings)
        kept = None if callable(weight) else weight
        ctx.save_for_backward(x if w_needed else None, ctx.needs.saved_H(H), kept, lora_B, lora_scaling)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, H, weight, lora_B, lora_scaling = ctx.saved_tensors
        with no_autocast(dy.device.type):
            if ctx.dense is not None and ctx.needs.x:
                weight = ctx.dense()
            tokens = flatten_tokens(dy.to(ctx.settings.dtype))
            dw, db, dB, ds, dH = expand_backward(tokens, x, H, lora_B, lora_scaling, ctx.settings, ctx.needs)
            dx = None
            if ctx.needs.x and weight is not None:
                dx = tokens @ weight.to(ctx.settings.dtype)
                dx = dx.view(*dy.shape[:-1], dx.shape[1])
        return dx, dy if ctx.y_needed else None, dw, db, dH, dB, ds, None
