"""The public functions: one linear layer with n LoRA branches, and the branches alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from multilora_fast.ops.autograd import apply_op
from multilora_fast.ops.backends import choose, load
from multilora_fast.ops.call import Call, find
from multilora_fast.ops.checks import check_base, check_base_output, check_branches
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
        weight: (N, K), frozen or trainable, or a function that returns it (a quantized base), which is called again
            in backward and gets no gradient.
        bias: (N,) or None.
        lora_A, lora_B, lora_scaling: (n, r, K), (n, N, r) and (n, N), or (n, 1) for a scalar per branch. They may be
            kept in another floating-point dtype than x; their gradients come in their own.
        dropout_p: probability in [0, 1) of dropping an element of x before A, one mask for all branches.
        training: dropout acts only when true.
        seed: of the mask: an int, or an int64 tensor of one element on x's device; drawn from torch's generator of
            that device when None.
        backend: "triton", "torch", or None for Triton on a CUDA device and torch elsewhere.
        save_inputs: "exact", or "fp8" to keep x for backward as 8-bit floats (e4m3, a power of two per token) where
            nothing else keeps it: half the bytes of bfloat16, a lora_A gradient of 2 to 3 % relative error, and
            every other gradient exact. Not under torch.compile.
        exact_base: whether x Wᵀ is always the library's product, so that with scales of zero the output has the base
            layer's bits. Otherwise a GPU for which it was measured to be faster runs one kernel for the product and the
            branches, whose sums are rounded in another order.

    Returns: (..., N), in x's dtype or autocast's. Its backward can be taken once: no double backward. Under
    torch.func's transforms and torch.jit.trace the op is made of PyTorch's own operations instead.

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
    """y + Σᵢ scaling_factor·sᵢ ⊙ Bᵢ Aᵢ dropout(x), for bases that bring their own forward and backward.

    y (..., N) is left as it is; the result has its shape and dtype. Other arguments, limits and errors as
    :func:`multilora_linear`.
    """
    options = (scaling_factor, dropout_p, training, backend, save_inputs, True)
    return apply(x, y, None, None, lora_A, lora_B, lora_scaling, seed, options)


def dropout_mask(seed: Tensor | int, M: int, K: int, p: float, *, backend: str | None = None) -> Tensor:
    """The mask the op draws for x of M tokens and K features: bool (M, K), true where an element is kept.

    Kept elements are multiplied by 65536 / (65536 − round(65536·p)), which is 1/(1−p) up to 2⁻¹⁷. The mask depends on
    the seed, the backend and, for "torch", on whether the seed is on a CPU. An int is a seed on the CPU: for the mask
    of an op on a GPU pass a tensor there.

    Raises:
        ValueError: p outside [0, 1), M or K below 0, a seed that is neither an int of 64 bits nor an int64 tensor
            of one element.
    """
    check_dropout("p", p)
    for name, size in (("M", M), ("K", K)):
        check_integer(name, size, least=0)
    if not isinstance(seed, Tensor):
        seed = _seed_tensor(seed, torch.device("cpu"))
    return load(choose(backend, seed.device)).dropout_mask(seed, M, K, p)


def prepare(
    x, lora_A, lora_B, lora_scaling, scaling_factor, dropout_p, training, backend, save_inputs, exact_base
) -> OpSettings:
    """The settings of a call, after every check that does not concern the base layer."""
    check_branches(x, lora_A, lora_B, lora_scaling)
    return settings_for(x, scaling_factor, dropout_p, training, backend, save_inputs, exact_base)


def settings_for(x, scaling_factor, dropout_p, training, backend, save_inputs, exact_base) -> OpSettings:
    if not torch.compiler.is_compiling():  # comparing it would compile in its value
        check_scaling_factor(scaling_factor)
    check_dropout("dropout_p", dropout_p)
    check_save_inputs(save_inputs)
    check_switch("exact_base", exact_base)
    p = float(dropout_p) if training and dropout_p else 0.0
    dtype = autocast_dtype(x) or x.dtype
    return OpSettings(float(scaling_factor), p, dtype, choose(backend, x.device, dtype), save_inputs, exact_base)


def find_call(x, y, weight, bias, lora_A, lora_B, lora_scaling, options: tuple) -> Call:
    """The call with these tensors and the ``options`` of :func:`prepare`; its checks run at the first one."""
    dense = weight if isinstance(weight, Tensor) else None
    return find(
        (x, y, dense, bias, lora_A, lora_B, lora_scaling),
        (autocast_dtype(x), dense is None, options),
        lambda: checked(x, y, weight, bias, lora_A, lora_B, lora_scaling, options),
    )


def checked(x, y, weight, bias, lora_A, lora_B, lora_scaling, options: tuple) -> OpSettings:
    """The settings of a call, after every check."""
    settings = prepare(x, lora_A, lora_B, lora_scaling, *options)
    if y is not None:
        check_base_output(x, y, lora_B.shape[1])
    elif isinstance(weight, Tensor):
        check_base(x, weight, bias, lora_B.shape[1], autocast=autocast_dtype(x) is not None)
    elif not callable(weight):
        raise ValueError(f"weight must be a tensor or a function that returns one, not {weight!r}.")
    return settings


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
        return torch.tensor([seed], device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed must be an int64 tensor of one element on {device}, not {seed.dtype} {tuple(seed.shape)} "
            f"on {seed.device}."
        )
    return seed.reshape(1)


def apply(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, options: tuple) -> Tensor:
    """:func:`multilora_linear`, or :func:`multilora_add` where ``y`` is given, with the ``options`` of
    :func:`prepare`."""
    if torch.compiler.is_compiling():
        return _compiled(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, options)
    if is_seen_through():
        return _seen_through(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, options)
    call = find_call(x, y, weight, bias, lora_A, lora_B, lora_scaling, options)
    seed = seed_for(call.settings, seed, x)
    return apply_op(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, call)


def _seen_through(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, options):
    tensors = (x, y, weight, bias, lora_A, lora_B, lora_scaling)
    tracing = torch.jit.is_tracing()  # where sizes are tensors, which no check can compare
    settings = settings_for(x, *options) if tracing else checked(*tensors, options)
    return composite(*tensors, None if seed is None else seed_for(settings, seed, x), settings)


def _compiled(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, options):
    settings = checked(x, y, weight, bias, lora_A, lora_B, lora_scaling, options)
    if not isinstance(weight, Tensor | None):
        raise ValueError("weight as a function cannot be compiled: compile the base layer alone and use multilora_add.")
    if settings.save_inputs != "exact":
        raise ValueError(f'save_inputs="{settings.save_inputs}" cannot be compiled: use "exact" under torch.compile.')
    c, p, dtype, backend, _, exact_base = settings
    seed = seed_for(settings, seed, x)
    lora_scaling = lora_scaling * c  # a factor that Dynamo may hold as a symbol, which an op could not take
    return compiled(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed, 1.0, p, dtype, backend, exact_base)[0]
