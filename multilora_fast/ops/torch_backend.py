"""The three products of the op on torch matmuls, with the signatures of the Triton launchers in kernels/.

M tokens, D columns (K or N), n branches of rank r, R = n·r. A branch tensor ``w`` is a view (n, r, D): lora_A as it
is, or lora_B transposed. ``scale`` is a view (n, D); ``scaling`` a constant. Dropout is regenerated from ``seed``, an
int64 tensor of one element on x's device, once in forward and once in backward: the mask is never kept.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

# SplitMix64's constants.
_GAMMA, _MIX1, _MIX2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def threshold(p: float) -> int:
    """Of 65536 equally likely 16-bit draws, those below this are dropped."""
    return min(round(65536 * p), 65535)


def inverse_keep(p: float) -> float:
    """1/(1−p), of the probability as it is drawn."""
    return 65536 / (65536 - threshold(p))


def dropout_mask(seed: Tensor, M: int, K: int, p: float, dtype: torch.dtype = torch.bool) -> Tensor:
    """Keep-mask (M, K) in ``dtype``: element m·K + k keeps when its 16-bit draw reaches ``threshold(p)``."""
    draws = _words(seed, M * K // 4 + 1).view(torch.int16)[: M * K].view(M, K)
    return torch.ge(draws, threshold(p) - 32768, out=torch.empty(M, K, dtype=dtype, device=seed.device))


def _words(seed: Any, count: int) -> Tensor:
    """``count`` random 64-bit words. On a CPU from numpy's SFC64, which takes half the time of torch's generator;
    elsewhere from SplitMix64 (Steele, Lea, Flood 2014), which reads the seed on its device and so waits for nothing."""
    if seed.device.type == "cpu":
        words = np.random.SFC64(seed.item() % (1 << 64)).random_raw(count)
        return torch.from_numpy(words.view(np.int64))
    z = torch.arange(1, count + 1, device=seed.device).mul_(_GAMMA).add_(seed)
    z.bitwise_xor_((z >> 30).bitwise_and_((1 << 34) - 1)).mul_(_MIX1)
    z.bitwise_xor_((z >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX2)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def draw(seed: Any, M: int, K: int, p: float, dtype: torch.dtype) -> Tensor | None:
    """What the products below take as ``keep``: the mask, 0 or 1 in ``dtype``, for one forward or one backward.

    ``shrink`` and ``reduce`` use it up: dropout(x) takes its place, and no second tensor of x's size is made.
    """
    return None if threshold(p) == 0 else dropout_mask(seed, M, K, p, dtype)


def shrink(
    x: Tensor, w: Tensor, scale: Tensor | None = None, scaling: float = 1.0, keep=None, p: float = 0.0
) -> Tensor:
    """dropout(x) (M, D) times (scaling·scale ⊙ w)ᵀ → (M, R) in x's dtype."""
    if keep is not None:
        x, scaling = keep.mul_(x), scaling * inverse_keep(p)
    return x @ _stack(w, scale, scaling, x.dtype).t()


def expand(
    y: Tensor,
    h: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    scaling: float = 1.0,
    keep=None,
    p: float = 0.0,
    *,
    accumulate: bool = True,
) -> None:
    """y (M, D) += mask/(1−p) ⊙ (h (M, R) times scaling·scale ⊙ w), in place; y = … without ``accumulate``."""
    w = _stack(w, scale, scaling if keep is None else scaling * inverse_keep(p), y.dtype)
    h = h.to(y.dtype)
    if not accumulate:
        torch.mm(h, w, out=y)
        if keep is not None:
            y.mul_(keep)
    elif keep is None:
        y.addmm_(h, w)
    else:
        y.addcmul_(h @ w, keep)


def reduce(h: Tensor, x: Tensor, n: int, dtype: torch.dtype, keep=None, p: float = 0.0) -> Tensor:
    """h (M, R) ᵀ times dropout(x) (M, D) → (n, r, D) in ``dtype``."""
    if keep is not None:
        return (h.t() @ keep.mul_(x)).to(dtype).mul_(inverse_keep(p)).view(n, -1, x.shape[1])
    return (h.t() @ x).to(dtype).view(n, -1, x.shape[1])


def reduce_scaled(h: Tensor, dy: Tensor, w: Tensor, scale: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """P = dyᵀ h (D, R), and from it the gradients of lora_B, (n, D, r), and of the vector scale, (n, D).

    ``w`` is lora_B as a view (n, r, D). The first comes in w's dtype, the second in the wider of w's and scale's.
    """
    n, r, D = w.shape
    P = (dy.t() @ h).view(D, n, r).to(torch.promote_types(w.dtype, scale.dtype)).movedim(0, 1)
    db = torch.mul(P, _times(scale, scaling).unsqueeze(2), out=torch.empty(n, D, r, dtype=w.dtype, device=w.device))
    ds = _times(torch.linalg.vecdot(P, w.transpose(1, 2).to(P.dtype)), scaling)
    return db, ds


def _stack(w: Tensor, scale: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """The branches below each other, (R, D), scaled in their own precision and then cast.

    lora_B, the one with a scale, has its ranks next to each other in memory, and so has what is returned for it.
    """
    n, r, D = w.shape
    if scale is not None:
        stacked = torch.empty(D, n, r, dtype=dtype, device=w.device)
        torch.mul(w.transpose(1, 2), _times(scale, scaling).unsqueeze(2), out=stacked.transpose(0, 1))
        return stacked.view(D, -1).t()
    return _times(w, scaling).to(dtype).reshape(-1, D)


def _times(t: Tensor, scaling: float) -> Tensor:
    return t if scaling == 1.0 else t * scaling
