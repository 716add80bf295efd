"""Tensor validation. Errors are one sentence: the argument, the value, what is expected."""

import torch
from torch import Tensor


def check_branches(x: Tensor, lora_A: Tensor, lora_B: Tensor, lora_scaling: Tensor) -> None:
    """x (…, K), lora_A (n, r, K), lora_B (n, N, r), lora_scaling (n, N) or (n, 1): floating point, on one device."""
    for name, t in {"x": x, "lora_A": lora_A, "lora_B": lora_B, "lora_scaling": lora_scaling}.items():
        check_kind(name, t, x)
    if lora_A.dim() != 3 or 0 in lora_A.shape[:2]:
        raise ValueError(f"lora_A must have shape (n, r, K) with n, r of at least 1, not {tuple(lora_A.shape)}.")
    n, r, K = lora_A.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must have shape (..., {K}) to match lora_A's K, not {tuple(x.shape)}.")
    check_shape("lora_B", lora_B, (n, "N", r), "lora_A")
    check_scaling(lora_scaling, (n, lora_B.shape[1]))


def check_base(x: Tensor, weight: Tensor, bias: Tensor | None, N: int, *, autocast: bool) -> None:
    """weight (N, K) and bias (N,), on x's device, in x's dtype unless autocast casts them all."""
    given: list[tuple[str, Tensor, tuple]] = [("weight", weight, (N, x.shape[-1]))]
    if bias is not None:
        given.append(("bias", bias, (N,)))
    for name, t, shape in given:
        check_kind(name, t, x)
        check_shape(name, t, shape, "lora_B and x")
        if t.dtype != x.dtype and not autocast:
            raise ValueError(f"{name} is {t.dtype}, but x is {x.dtype}: cast one of them, or use torch.autocast.")


def check_kind(name: str, t: Tensor, x: Tensor) -> None:
    """A plain floating-point tensor on x's device."""
    if not isinstance(t, Tensor) or t.layout != torch.strided:
        kind = f"a {t.layout} tensor" if isinstance(t, Tensor) else repr(t)
        raise ValueError(f"{name} must be a dense tensor, not {kind}.")
    if hasattr(t, "device_mesh"):
        raise ValueError(f"{name} is a DTensor, which the op does not take: pass the full tensor, as FSDP2 does.")
    if not t.is_floating_point():
        raise ValueError(f"{name} must be floating point, not {t.dtype}.")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, but x is on {x.device}: put both on one device.")


def check_shape(name: str, t: Tensor, shape: tuple, others: str) -> None:
    """The sizes in ``shape``, which follow from ``others``; a letter stands for any size."""
    agree = t.dim() == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(t.shape, shape, strict=True)
    )
    if not agree:
        wanted = str(shape).replace("'", "")
        raise ValueError(f"{name} must have shape {wanted} to match {others}, not {tuple(t.shape)}.")


def check_scaling(lora_scaling: Tensor, shape: tuple[int, ...]) -> None:
    """A vector per branch, of ``shape`` (…, n, N), or a scalar."""
    scalar = (*shape[:-1], 1)
    if tuple(lora_scaling.shape) not in {shape, scalar}:
        raise ValueError(f"lora_scaling must have shape {shape} or {scalar}, not {tuple(lora_scaling.shape)}.")
