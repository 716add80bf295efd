"""expand, in place: y += H B̃ᵀ forward, dx += mask/(1−p) ⊙ (dH Ã) backward; or y = … instead of +=.

    y[m, d] += keep[m, d]/(1−p) · Σ_i Σ_j h[m, i·r + j] · scaling · scale[i, d] · w[i, j, d]

One program owns a tile of y, which is read (unless it is overwritten) and written once; the sum runs over the branches
in slices of their rank.
"""

import torch
import triton
import triton.language as tl

from .configs import KernelConfig, cdiv, device_of, pick
from .dropout import check_seed, drop_threshold, keep_inverse, keep_tile
from .launch import TL_DTYPES, check_weight, dot_dtype, launch, launch_options, rows, strides, sum_dtype
from .pack import pack


@triton.jit(do_not_specialize=["M", "threshold"])
def expand_kernel(
    y_ptr, h_ptr, w_ptr, scale_ptr, seed_ptr, M, D, threshold,
    stride_ym, stride_hm, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
    scaling: tl.constexpr, n: tl.constexpr, r: tl.constexpr, HAS_SCALE: tl.constexpr, DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    num_d = tl.cdiv(D, BLOCK_D)
    offs_m = (pid // num_d) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_d = ((pid % num_d) * BLOCK_D).to(tl.int32)
    offs_d = start_d + tl.arange(0, BLOCK_D)
    mask_m, mask_d = offs_m < M, offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_d[None, :]
    wide_d = offs_d.to(tl.int64)
    slices: tl.constexpr = (r + BLOCK_R - 1) // BLOCK_R
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    for t in range(n * slices):
        i = t // slices
        offs_j = (t % slices) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_j = offs_j < r
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm + (i * r + offs_j)[None, :]
        h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_j[None, :], other=0.0)
        w_ptrs = w_ptr + i.to(tl.int64) * stride_wi + offs_j.to(tl.int64)[:, None] * stride_wj
        w_ptrs += wide_d[None, :] * stride_wd
        w = tl.load(w_ptrs, mask=mask_j[:, None] & mask_d[None, :], other=0.0)
        if HAS_SCALE:
            s = tl.load(scale_ptr + i.to(tl.int64) * stride_si + wide_d * stride_sd, mask=mask_d, other=0.0)
            w = w.to(ACC) * (scaling * s.to(ACC))[None, :]
        elif scaling != 1.0:
            w = w.to(ACC) * scaling
        acc = tl.dot(h.to(DOT), w.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
    if ACCUMULATE:
        y = tl.load(y_ptrs, mask=mask, other=0.0)
    if DROPOUT:
        keep = keep_tile(seed_ptr, offs_m, start_d, D, threshold, BLOCK_D)
        # The mask changes layout on its way to the sums: as numbers that takes fewer instructions than as bits.
        factor = tl.where(keep, keep_inverse(threshold, ACC), 0.0)
        acc = tl.where(factor > 0.0, acc * factor, 0.0)
    if ACCUMULATE:
        # −0 + 0 is +0: where nothing is added the bits of y stay.
        acc = tl.where(acc == 0.0, y.to(ACC), y.to(ACC) + acc)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None = None,
    scaling: float = 1.0,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    accumulate: bool = True,
    config: KernelConfig | None = None,
) -> None:
    """Adds the branches to y (M, D) in place, from h (M, n·r), w (n, r, D) and scale None or (n, D) of any strides.

    The dropout mask of an (M, D) input multiplies what is added when `seed` (int64, one element) is given and p > 0.
    Where that is zero the bits of y do not change. With `accumulate=False` it is written instead: what y holds, which
    may be nothing yet, is neither read nor kept. y needs a contiguous last dimension. Raises ValueError for shapes or
    strides that do not fit, p outside [0, 1) or a seed that is not one int64 element.
    """
    if y.dim() != 2 or y.dtype not in TL_DTYPES or (y.stride(1) != 1 and y.shape[1] > 1):
        raise ValueError(
            f"y has shape {tuple(y.shape)}, strides {y.stride()}, wanted 2-D with a contiguous last dimension."
        )
    h = rows("h", h)
    M, D = y.shape
    check_weight(w, scale, D)
    dropout = check_seed(seed, p)
    n, r, _ = w.shape
    R = n * r
    if h.shape != (M, R):
        raise ValueError(f"h has shape {tuple(h.shape)}, wanted {(M, R)}.")
    if y.numel() == 0 or y.is_meta:
        return
    arch, _ = device_of(y)
    config = config or pick("expand", M, R, h.dtype, arch)
    if config.pack and (scale is not None or scaling != 1.0 or w.dtype != h.dtype or w.stride(2) != 1):
        w, scale, scaling = pack(w, h.dtype, scale, scaling)[None], None, 1.0
    if scale is None and w.stride(0) == w.shape[1] * w.stride(1):
        w = w.reshape(1, R, D)
    n, r, _ = w.shape
    stride_wi, stride_wj, stride_wd = w.stride()
    stride_si, stride_sd = strides(scale, 2)
    grid = (cdiv(M, config.BLOCK_M) * cdiv(D, config.BLOCK_D), 1)
    launch(
        y, expand_kernel, grid,
        y_ptr=y, h_ptr=h, w_ptr=w, scale_ptr=scale, seed_ptr=seed if dropout else None,
        M=M, D=D, threshold=drop_threshold(p), stride_ym=y.stride(0), stride_hm=h.stride(0),
        stride_wi=stride_wi, stride_wj=stride_wj, stride_wd=stride_wd, stride_si=stride_si, stride_sd=stride_sd,
        scaling=float(scaling), n=n, r=r, HAS_SCALE=scale is not None, DROPOUT=dropout,
        ACCUMULATE=accumulate, DOT=dot_dtype(h.dtype), ACC=TL_DTYPES[sum_dtype(h.dtype)],
        BLOCK_M=config.BLOCK_M, BLOCK_D=config.BLOCK_D, BLOCK_R=16 if r <= 16 or h.element_size() > 2 else 32,
        **launch_options(config),
    )  # fmt: skip
