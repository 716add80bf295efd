"""Self-check on first use: before the Triton kernels serve a device, dtype and adapter shape, those that the call
launches run on an input of few features there and are compared with torch in float64. It takes milliseconds, beside the
kernels' compilation."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from multilora_fast.ops import torch_backend
from multilora_fast.ops.backends import load, load_grouped

TOKENS = {"decode": 16, "512": 80, "2048": 1100, "8192": 4160}  # by the size classes of the kernels' table
K, N = 208, 144
Size = tuple[torch.dtype, tuple[int, ...]]


def check(direction: str, tokens: Tensor, w: Tensor, settings) -> None:
    """Check shrink, expand and reduce as ``direction``, "forward" or "backward", launches them for ``tokens`` (M, …)
    and branches ``w`` (n, r, …) in ``settings.dtype``.

    Raises:
        RuntimeError: a kernel differs from torch by more than rounding.
    """
    M, (n, r, _) = _tokens(tokens), w.shape
    _check(direction, tokens.device, settings.dtype, w.dtype, n, r, _factor(settings), settings.dropout_p, M)


def check_joint(direction: str, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, w: Tensor, settings) -> None:
    """The same for the joint kernel, where it writes y from x, weight, bias and the branches ``w``."""
    from multilora_fast.kernels.linear import joint_config

    n, r, _ = w.shape
    config = joint_config(y, x, weight, n * r, direction == "forward", settings.exact_base)
    if config is not None:
        c, p, dtype, biased = _factor(settings), settings.dropout_p, settings.dtype, bias is not None
        _check_joint(direction, x.device, dtype, w.dtype, n, r, c, p, biased, config, _tokens(x))


def check_grouped(x: Tensor, n: int, r: int, own: torch.dtype, settings) -> None:
    """The same for the kernels of experts, in both directions, for branches (E, n, r, …) in ``own``."""
    _check_grouped(x.device, settings.dtype, own, n, r, _factor(settings), settings.dropout_p)


def _factor(settings) -> float:
    """The scaling factor, or one near it that no product rounds to zero or infinity in half precision."""
    c = settings.scaling_factor
    return math.copysign(min(max(abs(c), 2.0**-6), 2.0**6), c)


def _tokens(x: Tensor) -> int:
    from multilora_fast.kernels.configs import size_class

    return TOKENS[size_class(len(x))]


@cache
def _check(direction: str, device, dtype, own, n: int, r: int, c: float, p: float, M: int) -> None:
    def products(ops, mask, c, x, dy, h, A, B, scale):
        w = B.transpose(1, 2)
        if direction == "forward":
            return {
                "shrink": ops.shrink(x, A, None, 1.0, mask(), p),
                "expand": _into(dy, ops.expand, h, w, scale, c),
            }
        db, ds, da = ops.reduce_all(h, dy, w, scale, c, h, x, A.dtype, mask(), p)
        return {
            "shrink": ops.shrink(dy, w, scale, c),
            "expand": _into(x, ops.expand, h, A, None, 1.0, mask(), p, accumulate=False),
            "reduce": da,
            "reduce (lora_B)": db,
            "reduce (lora_scaling)": ds,
        }

    _compare(products, load("triton"), torch_backend, _dropped, _sizes(dtype, own, M, K, N, n, r), M, device, p, c)


@cache
def _check_joint(
    direction: str, device, dtype, own, n: int, r: int, c: float, p: float, biased: bool, config, M: int
) -> None:
    from multilora_fast.kernels.configs import cdiv, device_of

    # More tiles than processors, so that programs walk from one to the next. Such outputs are large: a step may have
    # little memory left, so one is computed at a time, and the side that is not read has no rows.
    _, processors = device_of(torch.empty(0, device=device))
    wide = config.BLOCK_D * (processors // cdiv(M, config.BLOCK_M) + 1) - 16
    features, ours = (K, wide) if direction == "forward" else (wide, N), load("triton")

    def tile(ops) -> dict:
        return {"config": config} if ops is ours else {}

    def linear(ops, mask, c, x, dy, h, A, B, scale, weight, bias):
        y, w = dy.new_empty(M, wide), B.transpose(1, 2)
        ops.linear(y, x, weight, bias if biased else None, h, w, scale, c, transposed=True, **tile(ops))
        return {"product": y}

    def layer(ops, mask, c, x, dy, h, A, B, scale, weight, bias):
        y, w = dy.new_empty(M, wide), B.transpose(1, 2)
        ops.layer(y, x, weight, bias if biased else None, A, w, scale, c, mask(), p, **tile(ops))
        return {"product (of a layer)": y}

    def backward(ops, mask, c, x, dy, h, A, B, scale, weight, bias):
        dx = x.new_empty(M, wide)
        ops.linear(dx, dy, weight, None, h, A, None, 1.0, mask(), p, transposed=False, **tile(ops))
        return {"product": dx}

    sizes = [*_sizes(dtype, own, M, *features, n, r), (dtype, features[::-1]), (dtype, features[1:])]
    sizes[1 if direction == "forward" else 0] = (dtype, (0, wide))
    for products in (linear, layer) if direction == "forward" else (backward,):
        _compare(products, ours, torch_backend, _dropped, sizes, M, device, p, c)


@cache
def _check_grouped(device, dtype, own, n: int, r: int, c: float, p: float) -> None:
    E, S = 3, 80

    def products(ops, mask, c, x, dy, h, A, B, scale):
        ends = torch.tensor([50, 50, S], dtype=torch.int32, device=device)
        ids = torch.arange(S - 1, -1, -1, device=device)
        w, drop = B.transpose(2, 3), {"ids": ids, "bits": mask(), "p": p}
        db, ds = ops.reduce_scaled(h, dy, w, ends, scale, c)
        return {
            "grouped shrink": ops.shrink(x, A, ends, **drop),
            "grouped shrink (scaled)": ops.shrink(dy, w, ends, scale, c),
            "grouped expand": _into(x, ops.expand, h, A, ends, None, 1.0, **drop),
            "grouped expand (scaled)": _into(dy, ops.expand, h, w, ends, scale, c),
            "grouped reduce": ops.reduce(h, x, ends, n, A.dtype, **drop),
            "grouped reduce (lora_B)": db,
            "grouped reduce (lora_scaling)": ds,
        }

    exact, sizes = load_grouped("torch"), _sizes(dtype, own, S, K, N, n, r, E)
    _compare(products, load_grouped("triton"), exact, lambda keep: keep, sizes, S, device, p, c)


def _sizes(dtype, own, M: int, K: int, N: int, n: int, r: int, *experts: int) -> list[Size]:
    """The dtypes and shapes of x, dy, H, lora_A, lora_B and lora_scaling."""
    tokens = [(dtype, (M, size)) for size in (K, N, n * r)]
    return tokens + [(own, (*experts, n, *size)) for size in ((r, K), (N, r), (N,))]


def _dropped(keep: Tensor) -> torch_backend.Mask:
    return torch_backend.Mask(keep.clone())


def _compare(
    products: Callable[..., dict], ours, exact, dropped: Callable[[Tensor], Any], sizes: list[Size], M: int,
    device, p: float, c: float,
) -> None:  # fmt: skip
    """‖error‖ ≤ 4·(eps·‖result‖ + eps₃₂·‖the same formula on absolute values‖) for each product of ``ours``, against
    those of ``exact`` in float64, which take the mask as ``dropped`` makes it of a keep-mask; eps is the
    coarsest of their dtypes' and eps₃₂ that of the sums. ``sizes`` are those of the products' tensors, x first."""
    from multilora_fast.kernels.launch import check_not_capturing, unrecorded

    dtype, (_, K) = sizes[0]
    check_not_capturing((M, K))

    def draw(seed: int, to: torch.dtype, size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device).div(4).to(to)

    with unrecorded():
        tensors = [draw(i, *size) for i, size in enumerate(sizes)]
        kernels, seed = load("triton"), torch.tensor([7], device=device)
        bits = kernels.draw(seed, M, K, p, dtype)
        keep = None if bits is None else kernels.dropout_mask(seed, M, K, p).double()
        mask = lambda: None if keep is None else dropped(keep)  # noqa: E731
        found = products(ours, lambda: bits, c, *tensors)
        truths = products(exact, mask, c, *[t.double() for t in tensors])
        absolute = products(exact, mask, abs(c), *[t.double().abs() for t in tensors])
        eps, sums = max(torch.finfo(t.dtype).eps for t in tensors), torch.finfo(torch.float32).eps
        for name, got in found.items():
            error = got.double().sub_(truths[name]).norm().item()
            bound = 4 * (eps * truths[name].norm() + sums * absolute[name].norm()).item()
            if not error <= bound:
                raise RuntimeError(
                    f"Triton kernel {name} is wrong on {got.device} in {dtype}: "
                    f'error {error:.2e} where {bound:.2e} is rounding; use backend="torch".'
                )


def _into(y: Tensor, expand: Callable, *rest, **options) -> Tensor:
    """What ``expand`` makes of a copy of y."""
    y = y.clone()
    expand(y, *rest, **options)
    return y
