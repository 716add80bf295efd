"""Tensor validation. Errors are one sentence: the argument, the value, what is expected."""

from torch import Tensor


def check_branches(x: Tensor, lora_A: Tensor, lora_B: Tensor, lora_scaling: Tensor) -> None:
    """x (…, K), lora_A (n, r, K), lora_B (n, N, r), lora_scaling (n, N) or (n, 1): floating point, on one device."""
    named = {"x": x, "lora_A": lora_A, "lora_B": lora_B, "lora_scaling": lora_scaling}
    for name, t in named.items():
        if hasattr(t, "device_mesh"):
            raise ValueError(f"{name} is a DTensor, which the op does not take: pass the full tensor, as FSDP2 does.")
        if not t.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {t.dtype}.")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}: put both on one device.")
    if lora_A.dim() != 3 or 0 in lora_A.shape[:2]:
        raise ValueError(f"lora_A must have shape (n, r, K) with n, r of at least 1, not {tuple(lora_A.shape)}.")
    n, r, K = lora_A.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x must have shape (..., {K}) to match lora_A's K, not {tuple(x.shape)}.")
    if lora_B.dim() != 3 or lora_B.shape[0] != n or lora_B.shape[2] != r:
        raise ValueError(f"lora_B must have shape ({n}, N, {r}) to match lora_A, not {tuple(lora_B.shape)}.")
    N = lora_B.shape[1]
    if tuple(lora_scaling.shape) not in {(n, N), (n, 1)}:
        raise ValueError(f"lora_scaling must have shape ({n}, {N}) or ({n}, 1), not {tuple(lora_scaling.shape)}.")


def check_base(x: Tensor, weight: Tensor, bias: Tensor | None, N: int, *, autocast: bool) -> None:
    """weight (N, K) and bias (N,), on x's device, in x's dtype unless autocast casts them all."""
    K = x.shape[-1]
    for name, t, shape in (("weight", weight, (N, K)), ("bias", bias, (N,))):
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to match lora_B and x, not {tuple(t.shape)}.")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, but x is on {x.device}: put both on one device.")
        if not t.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {t.dtype}.")
        if t.dtype != x.dtype and not autocast:
            raise ValueError(f"{name} is {t.dtype}, but x is {x.dtype}: cast one of them, or use torch.autocast.")


def check_base_output(x: Tensor, y: Tensor, N: int) -> None:
    """y (..., N), the base layer's output for x: floating point, on x's device."""
    wanted = (*x.shape[:-1], N)
    if tuple(y.shape) != wanted:
        raise ValueError(f"y must have shape {wanted} to match x and lora_B, not {tuple(y.shape)}.")
    if not y.is_floating_point():
        raise ValueError(f"y must be floating point, not {y.dtype}.")
    if y.device != x.device:
        raise ValueError(f"y is on {y.device}, but x is on {x.device}: put both on one device.")
