"""No GPU is trusted untried: before the Triton kernels first serve a device, dtype and shape of adapter, each runs once
on a small input there and is compared with torch in float64. It takes milliseconds beside the kernels' compilation."""

from functools import cache

import torch
from torch import Tensor

from multilora_fast.ops import torch_backend
from multilora_fast.ops.backends import load

TOKENS = {"decode": 16, "512": 80, "2048": 1100, "8192": 4160}  # by the size classes of the kernels' table


def check(direction: str, tokens: Tensor, w: Tensor, settings) -> None:
    """Check the kernels that ``direction``, "forward" or "backward", launches for ``tokens`` (M, …) and branches ``w``
    (n, r, …) in ``settings.dtype``.

    Raises:
        RuntimeError: a kernel's result is not what torch computes, by more than rounding.
    """
    from multilora_fast.kernels.configs import size_class
    from multilora_fast.kernels.launch import unrecorded

    M = TOKENS[size_class(tokens.shape[0])]
    n, r, _ = w.shape
    dropout = settings.dropout_p if torch_backend.threshold(settings.dropout_p) else 0.0
    with unrecorded():
        _check(direction, tokens.device, settings.dtype, w.dtype, n, r, settings.scaling_factor, dropout, M)


@cache
def _check(direction: str, device, dtype, own, n: int, r: int, c: float, p: float, M: int) -> None:
    from multilora_fast.kernels.launch import check_not_capturing

    K, N = 208, 144
    check_not_capturing((M, K))
    x, dy, h = (_random(device, i, M, size).to(dtype) for i, size in enumerate((K, N, n * r)))
    A, B, scale = (_random(device, 3 + i, *size).to(own) for i, size in enumerate(((n, r, K), (n, N, r), (n, N))))
    w, seed = B.transpose(1, 2), torch.tensor([7], device=device)
    kernels = load("triton")
    keep = kernels.dropout_mask(seed, M, K, p).double() if p else None
    bits = kernels.draw(seed, M, K, p, dtype)
    if direction == "forward":
        _compare("shrink", torch_backend.shrink, kernels.shrink, (x, A, None, 1.0), keep, bits, p)
        _compare("expand", _expand(torch_backend.expand), _expand(kernels.expand), (dy, h, w, scale, c))
    else:
        _compare("shrink", torch_backend.shrink, kernels.shrink, (dy, w, scale, c))
        written, kernel = (_expand(expand, accumulate=False) for expand in (torch_backend.expand, kernels.expand))
        _compare("expand", written, kernel, (x, h, A, None, 1.0), keep, bits, p)
        _compare("reduce", _reduce(torch_backend.reduce), _reduce(kernels.reduce), (h, x, n), keep, bits, p)
        for i, name in enumerate(("reduce (lora_B)", "reduce (lora_scaling)")):
            summed, kernel = (
                lambda *a, f=f, i=i: f(*a)[i] for f in (torch_backend.reduce_scaled, kernels.reduce_scaled)
            )
            _compare(name, summed, kernel, (h, dy, w, scale, c))


def _compare(name, exact, kernel, arguments, keep=None, bits=None, p=0.0) -> None:
    """‖error‖ ≤ 4·eps·‖the same formula on absolute values‖, against ``exact`` in float64."""
    dropout = (bits, p) if keep is not None else ()
    got = kernel(*arguments, *dropout).double()
    eps = max(torch.finfo(a.dtype).eps for a in arguments if isinstance(a, Tensor))

    def double(f):
        wide = (f(a.double()) if isinstance(a, Tensor) else a for a in arguments)
        return exact(*wide, *((torch_backend.Mask(keep.clone()), p) if keep is not None else ()))

    truth = double(lambda t: t)
    error, bound = (got - truth).norm().item(), 4 * eps * double(Tensor.abs).norm().item()
    if not error <= bound:
        raise RuntimeError(
            f"Triton kernel {name} is wrong on {got.device} in {arguments[0].dtype}: "
            f'error {error:.2e} where {bound:.2e} is rounding; use backend="torch".'
        )


def _expand(function, accumulate=True):
    def expanded(y, *rest):
        y = y.clone()
        function(y, *rest, accumulate=accumulate)
        return y

    return expanded


def _reduce(function):
    return lambda h, x, n, *dropout: function(h, x, n, h.dtype, *dropout)


def _random(device: torch.device, seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator(device).manual_seed(seed), device=device)
