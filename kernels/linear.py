"""The base product plus the branches: y = x Wᵀ + b + H B̃ᵀ forward, dx = dy W + mask/(1−p) ⊙ (dH Ã) backward.

The joint kernel computes both where PRODUCT_WINS calls it faster. Elsewhere expand writes and torch's product adds to
it, which leaves the frozen layer's bits where expand writes zeros.
"""

from torch import Tensor

from .configs import KernelConfig, device_of, product_config
from .expand import expand
from .launch import multiply
from .pack import Packing
from .product import describable, product, rank_rows, serves
from .shrink import shrink


def linear(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, w: Tensor, scale: Tensor | None = None,
    scaling: float = 1.0, bits: Tensor | None = None, p: float = 0.0, *, transposed: bool, exact: bool = False,
    config: KernelConfig | None = None,
) -> None:  # fmt: skip
    """Writes y (M, N) = x Wᵀ (`transposed`, weight (N, K)) or x W (weight (K, N)), plus bias (N,) and the branches that
    `expand` adds for h, w, scale, scaling, bits and p. With `exact` the base product is torch's; with `config`, the
    joint kernel's tile, it is the joint kernel's where it can describe h."""
    config = config or joint_config(y, x, weight, h.shape[1], transposed, exact)
    if config is not None and describable(h):
        product(x, weight, bias, h, w, scale, scaling, bits, p, transposed=transposed, out=y, config=config)
    else:
        expand(y, h, w, scale, scaling, bits, p, accumulate=False, bias=bias)
        multiply(y, x, weight.t() if transposed else weight)


def layer(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Tensor | None,
    scaling: float, bits: Tensor | None, p: float, *, exact: bool = False, config: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """A whole forward: writes y (M, N) = x Wᵀ + bias + H B̃ᵀ from a (n, r, K) and b (n, r, N), and returns H (M, n·r).
    `exact` and `config` are :func:`linear`'s.

    The launch of shrink also packs B̃ for the joint kernel.
    """
    n, r, N = b.shape
    config = config or joint_config(y, x, weight, n * r, True, exact)
    if config is None:
        H = shrink(x, a, bits=bits, p=p)
        linear(y, x, weight, bias, H, b, scale, scaling, transposed=True, exact=exact)
        return H
    packed = rank_rows(N, n * r, x)
    H = shrink(x, a, bits=bits, p=p, packing=Packing(b, scale, scaling, packed.t()))
    linear(y, x, weight, bias, H, packed.t()[None], transposed=True, config=config)
    return H


def joint_config(y, x, weight, R: int, transposed: bool, exact: bool) -> KernelConfig | None:
    """The joint kernel's tile, None where it does not run."""
    (M, N), K, (arch, _) = y.shape, x.shape[1], device_of(x)
    layer = ("forward", M, K, N) if transposed else ("backward", M, N, K)
    config = None if exact else product_config(*layer, R, x.dtype, arch)
    return config if config is not None and serves(x, weight, None, y) else None
