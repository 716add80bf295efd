"""The public functions: one linear layer with n LoRA branches, and the branches alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from multilora_fast.ops.autograd import apply_op
from multilora_fast.ops.backends import choose, load
from multilora_fast.ops.call import find
from multilora_fast.ops.checks import check_base, check_branches, check_kind, check_shape
from multilora_fast.ops.compile import compiled
from multilora_fast.ops.composite import composite, is_seen_through
from multilora_fast.ops.equations import OpSettings
from multilora_fast.validation import (
    check_dropout,
    check_integer,
    check_save_inputs,
    check_scaling_factor,
    check_switch,
)

Weight = Tensor | Callable[[], Tensor]


def multilora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_scaling: Tensor,
    *,
    scaling_factor: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    backend: str | None = None,
    save_inputs: str = "exact",
    exact_base: bool = False,
) -> Tensor:
    """Linear layer with n LoRA branches: x Wᵀ + b + Σᵢ scaling_factor·sᵢ ⊙ Bᵢ Aᵢ dropout(x).

    Args:
        x: (..., K).
        weight: (N, K), frozen or trainable, or a function that returns it (for a quantized base), which is called
            again in backward and gets no gradient.
        bias: (N,) or None.
        lora_A, lora_B, lora_scaling: (n, r, K), (n, N, r) and (n, N), or (n, 1) for a scalar per branch. Their
            floating-point dtype may differ from x's; gradients have the parameter's dtype.
        dropout_p: probability in [0, 1) of dropping an element of x before A, one mask for all branches.
        training: whether to apply dropout.
        seed: of the mask, an int or an int64 tensor of one element on x's device. None draws it from torch's generator
            of that device.
        backend: "triton", "torch", or None for Triton on a CUDA device and torch elsewhere.
        save_inputs: "exact", or "fp8" to save x for backward as 8-bit floats (e4m3, a power of two per token) where
            nothing else saves it: half the bytes of bfloat16, 2 to 3 % relative error in the gradient of lora_A, every
            other gradient exact. Not under torch.compile.
        exact_base: always compute x Wᵀ with torch, so that with scales of zero the output has the base
            layer's bits. Otherwise one kernel computes the product and the branches on GPUs where it was measured to be
            faster; it sums in another order.

    Returns: (..., N), in x's dtype or autocast's. No double backward. Under torch.func's transforms,
    forward-mode differentiation and torch.jit.trace the op runs as PyTorch's own operations.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree, dropout_p outside [0, 1), a scaling_factor that is not
            finite, a backend that cannot run.
    """
    options = (scaling_factor, dropout_p, training, backend, save_inputs, exact_base)
    return apply(x, None, weight, bias, lora_A, lora_B, lora_scaling, seed, options)


def multilora_add(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_scaling: Tensor,
    *,
    scaling_factor: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    backend: str | None = None,
    save_inputs: str = "exact",
) -> Tensor:
    """y + Σᵢ scaling_factor·sᵢ ⊙ Bᵢ Aᵢ dropout(x), for base layers with their own forward and backward.

    y (..., N) is not modified; the result has its shape and dtype. Other arguments, limits and errors as in
    :func:`multilora_linear`.
    """
    if y is None:
        raise ValueError("y must be a dense tensor, not None.")
    options = (scaling_factor, dropout_p, training, backend, save_inputs, True)
    return apply(x, y, None, None, lora_A, lora_B, lora_scaling, seed, options)


def dropout_mask(seed: Tensor | int, M: int, K: int, p: float, *, backend: str | None = None) -> Tensor:
    """The mask the op draws for x of M tokens and K features: bool (M, K), true where an element is kept.

    Kept elements are multiplied by 65536 / (65536 − round(65536·p)), which is 1/(1−p) up to 2⁻¹⁷. The mask depends on
    the seed, the backend and, for "torch", the seed's device. An int is a seed on the CPU; pass a tensor on the GPU for
    the mask of an op there.

    Raises:
        ValueError: p outside [0, 1), M or K below 0, a seed that is neither an int of 64 bits nor an int64 tensor
            of one element.
    """
    check_dropout("p", p)
    for name, size in (("M", M), ("K", K)):
        check_integer(name, size, least=0)
    if seed is None:
        raise ValueError("seed must be an int of 64 bits or an int64 tensor of one element, not None.")
    seed = _seed_tensor(seed, seed.device if isinstance(seed, Tensor) else torch.device("cpu"))
    return load(choose(backend, seed.device)).dropout_mask(seed, M, K, p)


def checked(x, y, weight, bias, lora_A, lora_B, lora_scaling, options: tuple) -> OpSettings:
    """The settings of a call, after every check."""
    check_branches(x, lora_A, lora_B, lora_scaling)
    settings = _settings(x, *options)
    if y is not None:
        check_kind("y", y, x)
        check_shape("y", y, (*x.shape[:-1], lora_B.shape[1]), "x and lora_B")
    elif isinstance(weight, Tensor):
        check_base(x, weight, bias, lora_B.shape[1], autocast=autocast_dtype(x) is not None)
    elif not callable(weight):
        raise ValueError(f"weight must be a tensor or a function that returns one, not {weight!r}.")
    return settings


def _settings(x, scaling_factor, dropout_p, training, backend, save_inputs, exact_base) -> OpSettings:
    if not torch.compiler.is_compiling():  # a comparison would make its value a constant of the graph
        check_scaling_factor(scaling_factor)
    check_dropout("dropout_p", dropout_p)
    check_save_inputs(save_inputs)
    check_switch("exact_base", exact_base)
    p = float(dropout_p) if training and dropout_p else 0.0
    dtype = autocast_dtype(x) or x.dtype
    return OpSettings(float(scaling_factor), p, dtype, choose(backend, x.device, dtype), save_inputs, exact_base)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast chooses for x's products, or None; it leaves float64 alone."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def seed_for(settings: OpSettings, seed: Tensor | int | None, x: Tensor) -> Tensor | None:
    """The seed of a call's mask, on x's device, drawn where none is given; None without dropout."""
    return _seed_tensor(seed, x.device) if settings.dropout_p > 0.0 else None


def _seed_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint((1 << 63) - 1, (1,), device=device)
    if not isinstance(seed, Tensor):
        if not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed must be an int of 64 bits or an int64 tensor of one element, not {seed!r}.")
        return torch.tensor([seed], dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed must be an int64 tensor of one element on {device}, not {seed.dtype} {tuple(seed.shape)} "
            f"on {seed.device}."
        )
    return seed.reshape(1)


def apply(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, options: tuple) -> Tensor:
    """:func:`multilora_linear`, or :func:`multilora_add` where ``y`` is given. ``options`` are scaling_factor,
    dropout_p, training, backend, save_inputs and exact_base."""
    if torch.compiler.is_compiling():
        return _compiled(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, options)
    tensors = (x, y, weight, bias, lora_A, lora_B, lora_scaling)
    if is_seen_through():
        tracing = torch.jit.is_tracing()  # sizes are tensors then, which no check can compare
        settings = _settings(x, *options) if tracing else checked(*tensors, options)
        return composite(*tensors, None if seed is None else seed_for(settings, seed, x), settings)
    dense = weight if isinstance(weight, Tensor) else None
    key = (x, y, dense, bias, lora_A, lora_B, lora_scaling), (autocast_dtype(x), dense is None, options)
    call = find(*key, lambda: checked(*tensors, options))
    return apply_op(*tensors, seed_for(call.settings, seed, x), call)


def _compiled(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, options):
    settings = checked(x, y, weight, bias, lora_A, lora_B, lora_scaling, options)
    if not isinstance(weight, Tensor | None):
        raise ValueError("weight as a function cannot be compiled: compile the base layer alone and use multilora_add.")
    if settings.save_inputs != "exact":
        raise ValueError(f'save_inputs="{settings.save_inputs}" cannot be compiled: use "exact" under torch.compile.')
    c, p, dtype, backend, _, exact_base = settings
    seed = seed_for(settings, seed, x)
    if not torch.fx.experimental.symbolic_shapes.has_static_value(c):  # a symbol, which an op cannot take
        lora_scaling, c = lora_scaling * c, 1.0
    return compiled(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, c, p, dtype, backend, exact_base)[0]
