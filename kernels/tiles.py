"""Tiles of the small factors, H or dH and c·s⊙w, which every kernel reads alike, and their product."""

import triton
import triton.language as tl


@triton.jit
def weight_tile(
    weight,  # (w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd) of w [n, r, D], scale [n, D]
    offs_c,  # columns of H: column c is row c mod r of branch c // r
    offs_d, D,
    scaling: tl.constexpr, r: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """scaling·scale⊙w [BLOCK_R, BLOCK_D] in DOT, multiplied in ACC before the cast."""
    w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd = weight
    i, j, wide_d = (offs_c // r).to(tl.int64)[:, None], (offs_c % r).to(tl.int64)[:, None], offs_d.to(tl.int64)[None, :]
    mask = (offs_c < R)[:, None] & (offs_d < D)[None, :]
    w_ptrs = w_ptr + (i * stride_wi + j * stride_wj) + wide_d * stride_wd
    w = tl.load(w_ptrs, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_D]
    if scale_ptr is not None:
        s = tl.load(scale_ptr + i * stride_si + wide_d * stride_sd, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_D]
        w = w.to(ACC) * (scaling * s.to(ACC))
    elif scaling != 1.0:
        w = w.to(ACC) * scaling
    return w.to(DOT)


@triton.jit
def head_tile(h_ptrs, mask_m, offs_c, R: tl.constexpr, DOT: tl.constexpr):
    """Columns offs_c of the rows at h_ptrs [BLOCK_M, 1] that mask_m [BLOCK_M, 1] takes: [BLOCK_M, BLOCK_R] in DOT."""
    return tl.load(h_ptrs + offs_c[None, :], mask=mask_m & (offs_c < R)[None, :], other=0.0).to(DOT)


@triton.jit
def dot(a, b, acc):
    """acc + a b, summed in acc's dtype."""
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def store_columns(ptrs, mask, offs_c, tile, R: tl.constexpr):
    """Stores `tile` as columns offs_c of the rows at ptrs [BLOCK, 1] that mask [BLOCK, 1] takes."""
    tl.store(ptrs + offs_c[None, :], tile.to(ptrs.dtype.element_ty), mask=mask & (offs_c < R)[None, :])
