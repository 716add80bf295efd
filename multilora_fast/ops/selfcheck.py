"""Self-check on first use: before the Triton kernels serve a device, dtype and adapter shape, each runs on a small
input there and is compared with torch in float64. It takes milliseconds, next to the kernels' compilation."""

from functools import cache

import torch
from torch import Tensor

from multilora_fast.ops import torch_backend
from multilora_fast.ops.backends import load, load_grouped

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


def check_grouped(x: Tensor, n: int, r: int, own: torch.dtype, settings) -> None:
    """The same of the kernels of experts, forward and backward, for branches (E, n, r, …) in ``own``."""
    from multilora_fast.kernels.launch import unrecorded

    dropout = settings.dropout_p if torch_backend.threshold(settings.dropout_p) else 0.0
    with unrecorded():
        _check_grouped(x.device, settings.dtype, own, n, r, settings.scaling_factor, dropout)


@cache
def _check_grouped(device, dtype, own, n: int, r: int, c: float, p: float) -> None:
    from multilora_fast.kernels.launch import check_not_capturing

    E, S, K, N = 3, 80, 208, 144
    check_not_capturing((S, K))
    ends = torch.tensor([50, 50, S], dtype=torch.int32, device=device)
    ids = torch.arange(S - 1, -1, -1, device=device)
    x, dy, h = (_random(device, i, S, size).to(dtype) for i, size in enumerate((K, N, n * r)))
    sizes = (E, n, r, K), (E, n, N, r), (E, n, N)
    A, B, scale = (_random(device, 3 + i, *size).to(own) for i, size in enumerate(sizes))
    w, seed, kernels = B.transpose(2, 3), torch.tensor([7], device=device), load_grouped("triton")
    keep = load("triton").dropout_mask(seed, S, K, p).double() if p else None

    def products(ops, mask) -> dict:
        drop = {"ids": ids, "bits": mask, "p": p}
        return {
            "shrink": lambda x, w: ops.shrink(x, w, ends, **drop),
            "shrink (scaled)": lambda dy, w, s: ops.shrink(dy, w, ends, s, c),
            "expand": lambda y, h, w: _added(ops.expand, y, h, w, ends, None, 1.0, **drop),
            "expand (scaled)": lambda y, h, w, s: _added(ops.expand, y, h, w, ends, s, c),
            "reduce": lambda h, x: ops.reduce(h, x, ends, n, h.dtype, **drop),
            "reduce (lora_B)": lambda h, dy, w, s: ops.reduce_scaled(h, dy, w, ends, s, c)[0],
            "reduce (lora_scaling)": lambda h, dy, w, s: ops.reduce_scaled(h, dy, w, ends, s, c)[1],
        }

    given = (x, A), (dy, w, scale), (x, h, A), (dy, h, w, scale), (h, x), (h, dy, w, scale), (h, dy, w, scale)
    exact, ours = products(load_grouped("torch"), keep), products(kernels, kernels.draw(seed, S, K, p, dtype))
    for (name, kernel), arguments in zip(ours.items(), given, strict=True):
        _compare(f"grouped {name}", exact[name], kernel, arguments)


def _added(function, y, *rest, **options):
    y = y.clone()
    function(y, *rest, **options)
    return y


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
    return lambda y, *rest: _added(function, y, *rest, accumulate=accumulate)


def _reduce(function):
    return lambda h, x, n, *dropout: function(h, x, n, h.dtype, *dropout)


def _random(device: torch.device, seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator(device).manual_seed(seed), device=device)
