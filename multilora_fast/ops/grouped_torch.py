"""The grouped products of experts on torch matmuls, one expert at a time.

S rows sorted by expert; those of expert e end at ``ends[e]``. Branch tensors are views (E, n, r, D), scales (E, n, D).
Row s reads row ``ids[s]`` of the mask and, with an ``index``, row ``index[s]`` of x.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from multilora_fast.ops import torch_backend
from multilora_fast.ops.torch_backend import Mask


def valueless(t: Tensor) -> bool:
    return t.is_meta or isinstance(t, FakeTensor)


def segments(ends: Tensor, S: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and its slice. Without values in ``ends``, one expert with an even share of the rows
    stands for all, since only one expert's temporaries are alive at a time."""
    if valueless(ends):
        yield 0, slice(0, -(-S // len(ends)))
        return
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def draw(seed: Any, S: int, K: int, p: float, dtype: torch.dtype) -> Tensor | None:
    """The mask (S, K) of the unsorted rows; None where nothing is dropped."""
    return None if torch_backend.threshold(p) == 0 else torch_backend.dropout_mask(seed, S, K, p, dtype)


def shrink(
    x: Tensor, w: Tensor, ends: Tensor, scale: Tensor | None = None, scaling: float = 1.0,
    index: Tensor | None = None, ids: Tensor | None = None, bits: Tensor | None = None, p: float = 0.0,
) -> Tensor:  # fmt: skip
    """dropout(x) (scaling·scale ⊙ w_e)ᵀ → (S, R) in x's dtype, zero in rows of no expert."""
    S = len(x) if index is None else len(index)
    H = x.new_zeros(S, w.shape[1] * w.shape[2])
    for e, rows in segments(ends, S):
        own = None if scale is None else scale[e]
        torch_backend.shrink(_rows(x, index, rows), w[e], own, scaling, _mask(bits, ids, rows), p, out=H[rows])
    return H


def expand(
    y: Tensor, h: Tensor, w: Tensor, ends: Tensor, scale: Tensor | None = None, scaling: float = 1.0,
    ids: Tensor | None = None, bits: Tensor | None = None, p: float = 0.0,
) -> None:  # fmt: skip
    """y (S, D) += mask/(1−p) ⊙ (h (S, R) (scaling·scale ⊙ w_e)), in place; rows of no expert stay."""
    for e, rows in segments(ends, len(y)):
        own = None if scale is None else scale[e]
        torch_backend.expand(y[rows], h[rows], w[e], own, scaling, _mask(bits, ids, rows), p)


def reduce(
    h: Tensor, x: Tensor, ends: Tensor, n: int, dtype: torch.dtype,
    index: Tensor | None = None, ids: Tensor | None = None, bits: Tensor | None = None, p: float = 0.0,
) -> Tensor:  # fmt: skip
    """h_eᵀ dropout(x_e) → (E, n, r, D) in ``dtype``, zero for an expert without rows."""
    S, R = h.shape
    out = torch.zeros(len(ends), n, R // n, x.shape[1], dtype=dtype, device=x.device)
    for e, rows in segments(ends, S):
        out[e] = torch_backend.reduce(h[rows], _rows(x, index, rows), n, dtype, _mask(bits, ids, rows), p)
    return out


def reduce_scaled(
    h: Tensor, dy: Tensor, w: Tensor, ends: Tensor, scale: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The gradients of lora_B, (E, n, D, r) in w's dtype, and of the vector scale, (E, n, D)."""
    E, n, r, D = w.shape
    db = torch.zeros(E, n, D, r, dtype=w.dtype, device=w.device)
    ds = torch.zeros(E, n, D, dtype=torch.promote_types(w.dtype, scale.dtype), device=w.device)
    for e, rows in segments(ends, len(h)):
        db[e], ds[e] = torch_backend.reduce_scaled(h[rows], dy[rows], w[e], scale[e], scaling)
    return db, ds


def _rows(x: Tensor, index: Tensor | None, rows: slice) -> Tensor:
    return x[rows] if index is None else x[index[rows]]


def _mask(bits: Tensor | None, ids: Tensor | None, rows: slice) -> Mask | None:
    return None if bits is None or ids is None else Mask(bits[ids[rows]])
