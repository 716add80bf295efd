"""The op's products on torch matmuls, with the signatures of the Triton launchers in kernels/.

M tokens, D columns (K or N), n branches of rank r, R = n·r. A branch tensor ``w`` is a view (n, r, D): lora_A, or
lora_B transposed. ``scale`` is a view (n, D); ``scaling`` a constant. The dropout mask is drawn from a seed, an
int64 tensor of one element on x's device, once in forward and once in backward, and never saved.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def threshold(p: float) -> int:
    """Elements whose 16-bit draw is below this are dropped."""
    return min(round(65536 * p), 65535)


def inverse_keep(p: float) -> float:
    """1/(1−p), for p rounded to 16 bits as it is drawn."""
    return 65536 / (65536 - threshold(p))


def dropout_mask(seed: Any, M: int, K: int, p: float, dtype: torch.dtype = torch.bool) -> Tensor:
    """Keep-mask (M, K) in ``dtype``: an element keeps when its 16-bit draw reaches ``threshold(p)``.

    On a GPU it is the Triton kernels' mask, drawn without a sync; elsewhere SFC64, twice as fast as torch's.
    """
    if seed.is_meta:
        return torch.empty(M, K, dtype=dtype, device=seed.device)
    if seed.is_cuda:
        from multilora_fast.kernels.dropout import dropout_mask as drawn_there

        return drawn_there(seed, M, K, p, dtype)
    words = np.random.SFC64(seed.item() % (1 << 64)).random_raw(M * K // 4 + 1).view(np.int16)
    draws = torch.from_numpy(words)[: M * K].view(M, K)
    keep = torch.ge(draws, threshold(p) - 32768, out=torch.empty(M, K, dtype=dtype))
    return keep.to(seed.device)


class Mask:
    """The keep-mask, 0 or 1 in the dtype of the products, of one forward or one backward."""

    def __init__(self, keep: Tensor):
        self.keep: Any = keep

    def drop(self, x: Tensor) -> Tensor:
        """mask ⊙ x, written over the mask to save a tensor of x's size: the mask's last use."""
        dropped, self.keep = self.keep.mul_(x), None
        return dropped


def draw(seed: Any, M: int, K: int, p: float, dtype: torch.dtype) -> Mask | None:
    """The mask that the products below take; None where nothing is dropped."""
    return None if threshold(p) == 0 else Mask(dropout_mask(seed, M, K, p, dtype))


def shrink(
    x: Tensor, w: Tensor, scale: Tensor | None = None, scaling: float = 1.0, mask: Mask | None = None, p: float = 0.0,
    *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dropout(x) (scaling·scale ⊙ w)ᵀ → (M, R) in x's dtype, into ``out`` if given."""
    if mask is not None:
        x, scaling = mask.drop(x), scaling * inverse_keep(p)
    return torch.mm(x, _stack(w, scale, scaling, x.dtype).t(), out=out)


def expand(
    y: Tensor, h: Tensor, w: Tensor, scale: Tensor | None = None, scaling: float = 1.0, mask: Mask | None = None,
    p: float = 0.0, *, accumulate: bool = True,
) -> None:  # fmt: skip
    """y (M, D) += mask/(1−p) ⊙ (h (M, R) (scaling·scale ⊙ w)), in place; y = … without ``accumulate``."""
    w = _stack(w, scale, scaling if mask is None else scaling * inverse_keep(p), y.dtype)
    h = h.to(y.dtype)
    if not accumulate:
        torch.mm(h, w, out=y)
        if mask is not None:
            y.mul_(mask.keep)
    elif mask is None:
        y.addmm_(h, w)
    else:
        y.addcmul_(h @ w, mask.keep)


def multiply(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (M, N) += a (M, K) b (K, N)."""
    out.addmm_(a, b)


def linear(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, w: Tensor, scale: Tensor | None = None,
    scaling: float = 1.0, mask: Mask | None = None, p: float = 0.0, *, transposed: bool, exact: bool = False,
) -> None:  # fmt: skip
    """y (M, N) = x Wᵀ (``transposed``) or x W, + bias + what :func:`expand` adds."""
    if not transposed:
        expand(y, h, w, scale, scaling, mask, p, accumulate=False)
        multiply(y, x, weight)
        return
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
    expand(y, h, w, scale, scaling, mask, p)


def layer(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: Tensor | None,
    scaling: float, mask: Mask | None, p: float, *, exact: bool = False,
) -> Tensor:  # fmt: skip
    """Write y = x Wᵀ + bias + H B̃ᵀ, and return H (M, R)."""
    H = shrink(x, a, None, 1.0, mask, p)
    linear(y, x, weight, bias, H, b, scale, scaling, transposed=True, exact=exact)
    return H


def reduce(h: Tensor, x: Tensor, n: int, dtype: torch.dtype, mask: Mask | None = None, p: float = 0.0) -> Tensor:
    """hᵀ (R, M) dropout(x) (M, D) → (n, r, D) in ``dtype``."""
    if mask is not None:
        return (h.t() @ mask.drop(x)).to(dtype).mul_(inverse_keep(p)).unflatten(0, (n, -1))
    return (h.t() @ x).to(dtype).unflatten(0, (n, -1))


def reduce_scaled(h: Tensor, dy: Tensor, w: Tensor, scale: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """From P = dyᵀ h (D, R): dB (n, D, r) in lora_B's dtype, and ds (n, D) of the vector scale in the wider of lora_B's
    and the scale's. ``w`` is lora_B as a view (n, r, D)."""
    n, r, D = w.shape
    P = (dy.t() @ h).view(D, n, r).to(torch.promote_types(w.dtype, scale.dtype)).movedim(0, 1)
    db = torch.mul(P, _times(scale, scaling).unsqueeze(2), out=torch.empty(n, D, r, dtype=w.dtype, device=w.device))
    ds = _times(torch.linalg.vecdot(P, w.transpose(1, 2).to(P.dtype)), scaling)
    return db, ds


def reduce_all(
    h: Tensor, dy: Tensor, w: Tensor, scale: Tensor, scaling: float, dh: Tensor, x: Tensor, dtype, mask=None, p=0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(dB, ds, dA): ``reduce_scaled(h, dy, …)`` and ``reduce(dh, x, …)``."""
    return *reduce_scaled(h, dy, w, scale, scaling), reduce(dh, x, w.shape[0], dtype, mask, p)


def _stack(w: Tensor, scale: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """The branches stacked, (R, D), scaled in their own precision and then cast. With a scale w is lora_B, whose ranks
    are contiguous; they stay so."""
    n, r, D = w.shape
    if scale is not None:
        stacked = torch.empty(D, n, r, dtype=dtype, device=w.device)
        torch.mul(w.transpose(1, 2), _times(scale, scaling).unsqueeze(2), out=stacked.transpose(0, 1))
        return stacked.flatten(1).t()
    return _times(w, scaling).to(dtype).flatten(0, 1)


def _times(t: Tensor, scaling: float) -> Tensor:
    return t if scaling == 1.0 else t * scaling
