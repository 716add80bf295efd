"""The op as a custom op, opaque to torch.compile. Eager mode uses the Function, which costs less per call."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import compress

import torch
from torch import Tensor

from multilora_fast.ops.autograd import backward, forward, needs_of, saved
from multilora_fast.ops.call import Call
from multilora_fast.ops.equations import Needs, OpSettings


@torch.library.custom_op("multilora_fast::multilora", mutates_args=())
def compiled(
    x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    lora_scaling: Tensor, seed: Tensor | None, scaling_factor: float, dropout_p: float, dtype: torch.dtype,
    backend: str, exact_base: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _call(scaling_factor, dropout_p, dtype, backend, exact_base)
    out, H = forward(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, call, new=None)
    return out, H


@compiled.register_fake
def _(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, c, p, dtype, backend, exact_base=False):
    n, r, _ = lora_A.shape
    out = x.new_empty(*x.shape[:-1], lora_B.shape[1], dtype=dtype if y is None else y.dtype)
    return out, x.new_empty(math.prod(x.shape[:-1]), n * r, dtype=dtype)


@torch.library.custom_op("multilora_fast::multilora_backward", mutates_args=())
def compiled_backward(
    dy: Tensor, x: Tensor | None, H: Tensor | None, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    lora_scaling: Tensor, seed: Tensor | None, scaling_factor: float, dropout_p: float, dtype: torch.dtype,
    backend: str, needs: Sequence[bool], exact_base: bool = False,
) -> list[Tensor]:  # fmt: skip
    call = _call(scaling_factor, dropout_p, dtype, backend, exact_base)
    grads = backward(dy, x, None, H, weight, lora_A, lora_B, lora_scaling, seed, call, _needs(*needs))
    return list(compress(grads, needs))  # type: ignore[arg-type]


@compiled_backward.register_fake
def _(dy, x, H, weight, lora_A, lora_B, lora_scaling, seed, c, p, dtype, backend, needs, exact_base=False):
    K, N = lora_A.shape[2], lora_B.shape[1]
    branches = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (lora_A, lora_B, lora_scaling))
    base = dy.new_empty(N, K, dtype=dtype), dy.new_empty(N, dtype=dtype)
    grads = [dy.new_empty(*dy.shape[:-1], K, dtype=dtype), *base, *branches]  # in the order of Needs
    return list(compress(grads, needs))


def _setup(ctx, inputs, output):
    x, _, weight, _, *rest = inputs[:8]
    *ctx.settings, ctx.exact_base = (*inputs[8:], False)[:5]  # a default may be left out
    ctx.needs, ctx.y_needed = needs_of(tuple(ctx.needs_input_grad[:7]))
    ctx.rest = len(inputs) - 7
    x, _, H = saved(x, output[1], OpSettings(*ctx.settings), ctx.needs)
    ctx.save_for_backward(x, H, weight, *rest)


def _compiled_backward(ctx, dy, _):
    grads = iter(compiled_backward(dy, *ctx.saved_tensors, *ctx.settings, ctx.needs, ctx.exact_base))
    dx, *others = (next(grads) if needed else None for needed in ctx.needs)
    return dx, dy if ctx.y_needed else None, *others, *[None] * ctx.rest


compiled.register_autograd(_compiled_backward, setup_context=_setup)


_needs = cache(Needs)


@cache
def _call(scaling_factor: float, dropout_p: float, dtype: torch.dtype, backend: str, exact_base: bool) -> Call:
    """The call for any tensors, which were checked when they were traced."""
    return Call(OpSettings(scaling_factor, dropout_p, dtype, backend, exact_base=exact_base))
