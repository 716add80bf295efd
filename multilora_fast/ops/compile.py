"""The op for torch.compile, which keeps it whole in its graph.

A library call costs more than the eager Function, so only compilation takes this way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from multilora_fast.ops.equations import Needs, OpSettings, backward, forward, no_autocast
from multilora_fast.ops.saved_input import SavedInput


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
    settings = OpSettings(scaling_factor, dropout_p, dtype, backend)
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
    settings = OpSettings(scaling_factor, dropout_p, dtype, backend)
    with no_autocast(dy.device.type):
        grads = backward(dy, SavedInput(x), H, weight, lora_A, lora_B, lora_scaling, seed, settings, Needs(*needs))
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
    kept = ctx.needs.saved_x(x, OpSettings(*ctx.settings)).x
    ctx.save_for_backward(kept, ctx.needs.saved_H(output[1]), weight, *rest)


def _compiled_backward(ctx, dy, _):
    grads = iter(compiled_backward(dy, *ctx.saved_tensors, *ctx.settings, ctx.needs))
    dx, *others = (next(grads) if needed else None for needed in ctx.needs)
    return dx, dy if ctx.needs_input_grad[1] else None, *others, *[None] * 5


compiled.register_autograd(_compiled_backward, setup_context=_setup)
