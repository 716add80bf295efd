"""Self-check on first use: before the Triton kernels serve a device, dtype and adapter shape, shrink, expand and reduce
run on a small input there and are compared with torch in float64. It takes milliseconds, beside the kernels'
compilation. The joint kernel depends on the layer's shape and is not checked here, but by the tests on a GPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from multilora_fast.ops import torch_backend
from multilora_fast.ops.backends import load, load_grouped

TOKENS = {"decode": 16, "512": 80, "2048": 1100, "8192": 4160}  # by the size classes of the kernels' table


def check(direction: str, tokens: Tensor, w: Tensor, settings) -> None:
    """Check the kernels that ``direction``, "forward" or "backward", launches for ``tokens`` (M, …) and branches ``w``
    (n, r, …) in ``settings.dtype``.

    Raises:
        RuntimeError: a kernel differs from torch by more than rounding.
    """
    from multilora_fast.kernels.configs import size_class

    M, (n, r, _) = TOKENS[size_class(len(tokens))], w.shape
    _check(direction, tokens.device, settings.dtype, w.dtype, n, r, settings.scaling_factor, settings.dropout_p, M)


def check_grouped(x: Tensor, n: int, r: int, own: torch.dtype, settings) -> None:
    """The same for the kernels of experts, in both directions, for branches (E, n, r, …) in ``own``."""
    _check_grouped(x.device, settings.dtype, own, n, r, settings.scaling_factor, settings.dropout_p)


@cache
def _check(direction: str, device, dtype, own, n: int, r: int, c: float, p: float, M: int) -> None:
    def products(ops, mask, x, dy, h, A, B, scale):
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

    dropped = lambda keep: torch_backend.Mask(keep.clone())  # noqa: E731
    _compare(products, load("triton"), torch_backend, dropped, (), M, device, dtype, own, n, r, p)


@cache
def _check_grouped(device, dtype, own, n: int, r: int, c: float, p: float) -> None:
    E, S = 3, 80

    def products(ops, mask, x, dy, h, A, B, scale):
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

    exact = load_grouped("torch")
    _compare(products, load_grouped("triton"), exact, lambda keep: keep, (E,), S, device, dtype, own, n, r, p)


def _compare(
    products: Callable[..., dict], ours, exact, dropped: Callable[[Tensor], Any], experts: tuple[int, ...], M: int,
    device, dtype, own, n: int, r: int, p: float,
) -> None:  # fmt: skip
    """‖error‖ ≤ 4·eps·‖the same formula on absolute values‖ for each product of ``ours``, against those of ``exact`` in
    float64, which take the mask as ``dropped`` makes it of a keep-mask."""
    from multilora_fast.kernels.launch import check_not_capturing, unrecorded

    K, N = 208, 144
    check_not_capturing((M, K))

    def draw(seed: int, to: torch.dtype, *size: int) -> Tensor:
        return torch.randn(*size, generator=torch.Generator(device).manual_seed(seed), device=device).to(to)

    with unrecorded():
        tensors = [draw(i, dtype, M, size) for i, size in enumerate((K, N, n * r))]
        tensors += [draw(3 + i, own, *experts, n, *size) for i, size in enumerate(((r, K), (N, r), (N,)))]
        kernels, seed = load("triton"), torch.tensor([7], device=device)
        bits = kernels.draw(seed, M, K, p, dtype)
        keep = None if bits is None else kernels.dropout_mask(seed, M, K, p).double()
        mask = lambda: None if keep is None else dropped(keep)  # noqa: E731
        found = products(ours, lambda: bits, *tensors)
        truths = products(exact, mask, *[t.double() for t in tensors])
        sizes = products(exact, mask, *[t.double().abs() for t in tensors])
        eps = max(torch.finfo(t.dtype).eps for t in tensors)
        for name, got in found.items():
            error, bound = (got.double() - truths[name]).norm().item(), 4 * eps * sizes[name].norm().item()
            if not error <= bound:
                raise RuntimeError(
                    f"Triton kernel {name} is wrong on {got.device} in {tensors[0].dtype}: "
                    f'error {error:.2e} where {bound:.2e} is rounding; use backend="torch".'
                )


def _into(y: Tensor, expand: Callable, *rest, **options) -> Tensor:
    """What ``expand`` makes of a copy of y."""
    y = y.clone()
    expand(y, *rest, **options)
    return y
