"""The op for torch.compile, which sees custom ops. Eager mode uses the Function, which costs less per call.

Dynamo traces ``multilora``, whose autograd kernel calls ``multilora_forward`` and ``multilora_backward``: these two run
in the compiled graph. They are defined on a Library, because torch.library.custom_op checks every call for aliases and
enters Python once more for autograd, which takes longer than the op's own Python.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import compress

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from multilora_fast.ops.autograd import backward, forward, needs_of, saved
from multilora_fast.ops.call import Call
from multilora_fast.ops.equations import Needs, OpSettings

_LIBRARY = torch.library.Library("multilora_fast", "FRAGMENT")


def _define(name: str, function: Callable, fake: Callable):
    """The op ``name``, which runs ``function`` on every device and ``fake`` on fake tensors."""
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"multilora_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.multilora_fast, name).default


def _forward(
    x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    lora_scaling: Tensor, seed: Tensor | None, scaling_factor: float, dropout_p: float, dtype: torch.dtype,
    backend: str, exact_base: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _call(scaling_factor, dropout_p, dtype, backend, exact_base)
    out, H = forward(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, call, new=None)
    return out, H


def _fake_forward(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, c, p, dtype, backend, exact_base=False):
    n, r, _ = lora_A.shape
    out = x.new_empty(*x.shape[:-1], lora_B.shape[1], dtype=dtype if y is None else y.dtype)
    return out, x.new_empty(math.prod(x.shape[:-1]), n * r, dtype=dtype)


def _backward(
    dy: Tensor, x: Tensor | None, H: Tensor | None, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    lora_scaling: Tensor, seed: Tensor | None, scaling_factor: float, dropout_p: float, dtype: torch.dtype,
    backend: str, needs: Sequence[bool], exact_base: bool = False,
) -> list[Tensor]:  # fmt: skip
    call = _call(scaling_factor, dropout_p, dtype, backend, exact_base)
    grads = backward(dy, x, None, H, weight, lora_A, lora_B, lora_scaling, seed, call, _needs(*needs))
    return list(compress(grads, needs))  # type: ignore[arg-type]


def _fake_backward(
    dy, x, H, weight, lora_A, lora_B, lora_scaling, seed, c, p, dtype, backend, needs, exact_base=False
):  # fmt: skip
    K, N = lora_A.shape[2], lora_B.shape[1]
    branches = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (lora_A, lora_B, lora_scaling))
    base = dy.new_empty(N, K, dtype=dtype), dy.new_empty(N, dtype=dtype)
    grads = [dy.new_empty(*dy.shape[:-1], K, dtype=dtype), *base, *branches]  # in the order of Needs
    return list(compress(grads, needs))


compiled = _define("multilora", _forward, _fake_forward)
compiled_forward = _define("multilora_forward", _forward, _fake_forward)
compiled_backward = _define("multilora_backward", _backward, _fake_backward)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        out, H = compiled_forward(*inputs)
        x, _, weight, _, *rest = inputs[:8]
        *ctx.settings, ctx.exact_base = inputs[8:]
        ctx.needs, ctx.y_needed = needs_of(ctx.needs_input_grad[:7])
        x, _, kept = saved(x, H, OpSettings(*ctx.settings), ctx.needs)
        ctx.save_for_backward(x, kept, weight, *rest)
        ctx.mark_non_differentiable(H)
        return out, H

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        grads = iter(compiled_backward(dy, *ctx.saved_tensors, *ctx.settings, ctx.needs, ctx.exact_base))
        dx, *others = (next(grads) if needed else None for needed in ctx.needs)
        return dx, dy if ctx.y_needed else None, *others, *[None] * 6


def _autograd(*inputs):
    if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        with torch._C._AutoDispatchBelowAutograd():  # itself, so that an exported graph can still be trained
            return compiled(*inputs)
    return _Compiled.apply(*inputs, *[False][len(inputs) - 12 :])  # a default may be left out


_LIBRARY.impl("multilora", _autograd, "Autograd")

_needs = cache(Needs)


@cache
def _call(scaling_factor: float, dropout_p: float, dtype: torch.dtype, backend: str, exact_base: bool) -> Call:
    """The call for any tensors, which were checked when they were traced."""
    return Call(OpSettings(scaling_factor, dropout_p, dtype, backend, exact_base=exact_base))
