"""expand by experts: y += H B̃_eᵀ forward, dx += mask/(1−p) ⊙ (dH Ã_e) backward, for S rows sorted by expert.

    y[s, d] += keep[s, d]/(1−p) · Σ_i Σ_j h[s, i·r + j] · scaling · scale[e, i, d] · w[e, i, j, d]

A program keeps a tile of one expert's rows of h and walks over the features in tiles of BLOCK_D. A rank larger than its
configuration holds runs in slices, of which h is read again on every tile. Rows of no expert keep their bits, and so
does y where nothing is added: the weight carries a minus sign and the sum is subtracted, as in expand.py.

Bytes: y read and written once; h read once by each program of its rows; the weight and scale of an expert read once by
each of its tiles of rows, which L2 serves. Of a mask S·⌈D/32⌉·4 more.
"""

import torch
import triton
import triton.language as tl

from .configs import KernelConfig, cdiv, device_of, pick, slice_tiles
from .dropout import drop_threshold, keep_inverse, keep_tile
from .grouped import (
    as_one_branch,
    check_experts,
    check_offsets,
    find_rows,
    find_tile,
    mask_arguments,
    most_tiles,
    weight_arguments,
)
from .launch import TL_DTYPES, check_written, dot_dtype, launch, launch_options, rows, sum_dtype
from .pack import weight_tile


@triton.jit(do_not_specialize=["S", "E", "steps", "parts", "mask_rows", "threshold"])
def grouped_expand_kernel(
    y_ptr,  # (S, D)
    h_ptr,  # (S, R)
    w_ptr,  # (E, n, r, D), any strides
    scale_ptr,  # (E, n, D), any strides, or None
    offs_ptr,  # (E,)
    ids_ptr,  # (S,), or None where row s of the mask is that of row s
    bits_ptr,  # (mask_rows, ⌈D/32⌉) or None
    S,
    E,
    D,
    steps,  # tiles of features that a program walks over
    parts,  # programs of one tile of rows
    mask_rows,
    threshold,
    stride_ym,
    stride_hm,
    stride_we,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_se,
    stride_si,
    stride_sd,
    stride_bits,
    scaling: tl.constexpr,  # with the minus sign
    r: tl.constexpr,
    R: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
    BLOCK_E: tl.constexpr,
):
    slices: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    pid = tl.program_id(0)
    e, start_m, end_m = find_tile(offs_ptr, pid // parts, S, E, BLOCK_M, BLOCK_E)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < end_m)[:, None]
    offs_c = tl.arange(0, BLOCK_R)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
    w_ptr += e.to(tl.int64) * stride_we
    if HAS_SCALE:
        scale_ptr += e.to(tl.int64) * stride_se
    if DROPOUT:
        mask_m_rows = find_rows(ids_ptr, offs_m, offs_m < end_m)
    if slices == 1:
        h = tl.load(h_ptrs + offs_c[None, :], mask=mask_m & (offs_c < R)[None, :], other=0.0).to(DOT)
    if BLOCK_R2 > 0:
        offs_c2 = BLOCK_R + tl.arange(0, BLOCK_R2)
        h2 = tl.load(h_ptrs + offs_c2[None, :], mask=mask_m & (offs_c2 < R)[None, :], other=0.0).to(DOT)
    start = (pid % parts) * steps * BLOCK_D
    for start_d in range(start, tl.where(e < E, min(start + steps * BLOCK_D, D), 0), BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        if slices == 1:
            w = weight_tile(
                w_ptr, scale_ptr, offs_c, offs_d, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
                scaling, r, R, HAS_SCALE, DOT, ACC,
            )  # fmt: skip  # [BLOCK_R, BLOCK_D]
            acc = tl.dot(h, w, acc, input_precision="ieee", out_dtype=ACC)
            if BLOCK_R2 > 0:
                w2 = weight_tile(
                    w_ptr, scale_ptr, offs_c2, offs_d, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
                    scaling, r, R, HAS_SCALE, DOT, ACC,
                )  # fmt: skip  # [BLOCK_R2, BLOCK_D]
                acc = tl.dot(h2, w2, acc, input_precision="ieee", out_dtype=ACC)
        else:
            for start_c in range(0, R, BLOCK_R):
                offs_s = start_c + offs_c
                v = tl.load(h_ptrs + offs_s[None, :], mask=mask_m & (offs_s < R)[None, :], other=0.0)
                w = weight_tile(
                    w_ptr, scale_ptr, offs_s, offs_d, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
                    scaling, r, R, HAS_SCALE, DOT, ACC,
                )  # fmt: skip  # [BLOCK_R, BLOCK_D]
                acc = tl.dot(v.to(DOT), w, acc, input_precision="ieee", out_dtype=ACC)
        if DROPOUT:
            keep = keep_tile(bits_ptr, mask_m_rows, start_d, mask_rows, stride_bits, BLOCK_M, BLOCK_D)
            acc = tl.where(keep, acc * keep_inverse(threshold, ACC), 0.0)
        mask = mask_m & (offs_d < D)[None, :]
        acc = tl.load(y_ptrs + offs_d[None, :], mask=mask, other=0.0).to(ACC) - acc  # [BLOCK_M, BLOCK_D]
        tl.store(y_ptrs + offs_d[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def grouped_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    w: torch.Tensor,
    offs: torch.Tensor,
    scale: torch.Tensor | None = None,
    scaling: float = 1.0,
    ids: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    p: float = 0.0,
    config: KernelConfig | None = None,
) -> None:
    """Adds the branches of each row's expert to y (S, D) in place, from h (S, n·r), w (E, n, r, D) and scale None or
    (E, n, D) of any strides, and offs (E,) int32.

    `bits` is a dropout mask as `draw` gives it for p and D columns, of which row ids[s], or without ids row s, is that
    of row s; it multiplies what is added. Where that is zero the bits of y do not change, nor do those of rows from
    offs[E−1] on. y needs a contiguous last dimension. Raises ValueError for shapes, strides or dtypes that do not fit
    or p outside [0, 1).
    """
    check_written("y", y)
    h = rows("h", h)
    S, D = y.shape
    check_experts(w, scale, D)
    E = check_offsets(offs, w.shape[0])
    mask, threshold = mask_arguments(bits, ids, S, D), drop_threshold(p)
    R = w.shape[1] * w.shape[2]
    w = as_one_branch(w, scale)
    if h.shape != (S, R):
        raise ValueError(f"h has shape {tuple(h.shape)}, wanted {(S, R)}.")
    if y.numel() == 0 or y.is_meta:
        return
    arch, processors = device_of(y)
    config = config or pick("grouped_expand", S // E, R, h.dtype, arch, dropout=mask["DROPOUT"])
    block_r, block_r2 = slice_tiles(R, config, h.element_size())
    tiles_m, tiles_d = most_tiles(S, E, config.BLOCK_M), cdiv(D, config.BLOCK_D)
    steps = min(tiles_d, cdiv(tiles_m * tiles_d, processors * config.programs))
    parts = cdiv(tiles_d, steps)
    launch(
        y, grouped_expand_kernel, (tiles_m * parts, 1),
        y_ptr=y, h_ptr=h, offs_ptr=offs, S=S, E=E, D=D, steps=steps, parts=parts, threshold=threshold,
        stride_ym=y.stride(0), stride_hm=h.stride(0), **weight_arguments(w, scale), **mask,
        scaling=-float(scaling), r=w.shape[2], R=R,
        DOT=dot_dtype(h.dtype), ACC=TL_DTYPES[sum_dtype(h.dtype)], BLOCK_M=config.BLOCK_M, BLOCK_D=config.BLOCK_D,
        BLOCK_R=block_r, BLOCK_R2=block_r2, BLOCK_E=triton.next_power_of_2(E + 1), **launch_options(config),
    )  # fmt: skip
