"""shrink by experts: H = x̂ Ã_eᵀ forward, dH = dy B̃_e backward, for S rows sorted by expert.

    H[s, i·r + j] = Σ_d x̂[index[s], d] · scaling · scale[e, i, d] · w[e, i, j, d]        e the expert of row s

One program owns a tile of one expert's rows and as many of the R columns as its configuration holds. It gathers x by
row, so no sorted copy is made, and scales the weight on the tile, so none is packed. Rows of no expert get zeros.

Bytes: x read once a row, H written; the weight and scale of an expert read once by each of its tiles, which L2 serves.
Of a mask S·⌈D/32⌉·4 more.
"""

import torch
import triton
import triton.language as tl

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles
from .dropout import drop_threshold, keep_inverse, keep_tile
from .grouped import (
    as_one_branch,
    check_experts,
    check_index,
    check_offsets,
    find_rows,
    find_tile,
    mask_arguments,
    most_tiles,
    weight_arguments,
)
from .launch import TL_DTYPES, dot_dtype, launch, launch_options, rows, sum_dtype
from .pack import weight_tile


@triton.jit(do_not_specialize=["S", "E", "mask_rows", "threshold"])
def grouped_shrink_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (E, n, r, D), any strides
    scale_ptr,  # (E, n, D), any strides, or None
    out_ptr,  # (S, R)
    offs_ptr,  # (E,)
    index_ptr,  # (S,), or None where T is S
    ids_ptr,  # (S,), or None where row s of the mask is that of row s
    bits_ptr,  # (mask_rows, ⌈D/32⌉) or None
    S,
    E,
    D,
    mask_rows,
    threshold,
    stride_xm,
    stride_we,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_se,
    stride_si,
    stride_sd,
    stride_bits,
    scaling: tl.constexpr,
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
    chunks: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    pid = tl.program_id(0)
    e, start_m, end_m = find_tile(offs_ptr, pid // chunks, S, E, BLOCK_M, BLOCK_E)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end_m
    start_c = (pid % chunks) * (BLOCK_R + BLOCK_R2)
    offs_c = start_c + tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + find_rows(index_ptr, offs_m, mask_m)[:, None] * stride_xm
    w_ptr += e.to(tl.int64) * stride_we
    if HAS_SCALE:
        scale_ptr += e.to(tl.int64) * stride_se
    if DROPOUT:
        mask_m_rows = find_rows(ids_ptr, offs_m, mask_m)
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    if BLOCK_R2 > 0:
        offs_c2 = start_c + BLOCK_R + tl.arange(0, BLOCK_R2)
        acc2 = tl.zeros((BLOCK_M, BLOCK_R2), ACC)
    for start_d in range(0, tl.where(e < E, D, 0), BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptrs + offs_d[None, :], mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0).to(DOT)
        if DROPOUT:
            keep = keep_tile(bits_ptr, mask_m_rows, start_d, mask_rows, stride_bits, BLOCK_M, BLOCK_D)
            x = tl.where(keep, x, 0.0).to(DOT)  # [BLOCK_M, BLOCK_D]
        w = weight_tile(
            w_ptr, scale_ptr, offs_c, offs_d, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
            scaling, r, R, HAS_SCALE, DOT, ACC,
        )  # fmt: skip  # [BLOCK_R, BLOCK_D]
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee", out_dtype=ACC)
        if BLOCK_R2 > 0:
            w2 = weight_tile(
                w_ptr, scale_ptr, offs_c2, offs_d, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
                scaling, r, R, HAS_SCALE, DOT, ACC,
            )  # fmt: skip  # [BLOCK_R2, BLOCK_D]
            acc2 = tl.dot(x, tl.trans(w2), acc2, input_precision="ieee", out_dtype=ACC)
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * R
    if DROPOUT:
        acc *= keep_inverse(threshold, ACC)
    tl.store(out_ptrs + offs_c[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_c < R)[None, :])
    if BLOCK_R2 > 0:
        if DROPOUT:
            acc2 *= keep_inverse(threshold, ACC)
        tl.store(
            out_ptrs + offs_c2[None, :],
            acc2.to(out_ptr.dtype.element_ty),
            mask=mask_m[:, None] & (offs_c2 < R)[None, :],
        )


def grouped_shrink(
    x: torch.Tensor,
    w: torch.Tensor,
    offs: torch.Tensor,
    scale: torch.Tensor | None = None,
    scaling: float = 1.0,
    index: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    p: float = 0.0,
    config: KernelConfig | None = None,
) -> torch.Tensor:
    """H (S, n·r) in x's dtype, from w (E, n, r, D) and scale None or (E, n, D) of any strides, and offs (E,) int32.

    Row s reads row index[s] of x (T, D), index being int64 (S,), or without index row s of x (S, D). `bits` is a
    dropout mask as `draw` gives it for p and D columns, of which row ids[s] is that of row s, or without ids row s.
    Rows from offs[E−1] on are zero. Sums are float32, for float64 x float64. Raises ValueError for shapes or dtypes
    that do not agree or p outside [0, 1).
    """
    x = rows("x", x)
    D = x.shape[1]
    S = x.shape[0] if index is None else index.numel()
    check_experts(w, scale, D)
    E = check_offsets(offs, w.shape[0])
    check_index("index", index, S)
    mask, threshold = mask_arguments(bits, ids, S, D), drop_threshold(p)
    R = w.shape[1] * w.shape[2]
    w = as_one_branch(w, scale)
    out = torch.empty((S, R), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or out.is_meta:
        return out
    config = config or pick("grouped_shrink", S // E, R, x.dtype, device_of(x)[0], dropout=mask["DROPOUT"])
    block_r, block_r2 = rank_tiles(R, config)
    launch(
        x, grouped_shrink_kernel, (most_tiles(S, E, config.BLOCK_M) * cdiv(R, block_r + block_r2), 1),
        x_ptr=x, out_ptr=out, offs_ptr=offs, index_ptr=index, S=S, E=E, D=D, threshold=threshold, stride_xm=x.stride(0),
        **weight_arguments(w, scale), **mask, r=w.shape[2], R=R, scaling=float(scaling),
        DOT=dot_dtype(x.dtype), ACC=TL_DTYPES[sum_dtype(x.dtype)], BLOCK_M=config.BLOCK_M, BLOCK_D=config.BLOCK_D,
        BLOCK_R=block_r, BLOCK_R2=block_r2, BLOCK_E=triton.next_power_of_2(E + 1), **launch_options(config),
    )  # fmt: skip
    return out
