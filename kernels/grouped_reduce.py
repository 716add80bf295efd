"""reduce by experts: dÃ_e = dHᵀ x̂, and P = dyᵀ H with dB = c·s ⊙ P, ds = c·rowsum(B ⊙ P), over each expert's rows.

    P[e, d, c] = Σ_{s of e} z[s, d] · h[s, c]        z = x̂, gathered by row, or dy

One program sums all rows of one expert for BLOCK_D features and has P in registers then: the gradients are written from
them, with no parts, no second pass and no atomics. A rank larger than its configuration holds runs in chunks, one after
the other in the same program. An expert without rows gets zeros.

Bytes: z read once a row and chunk, h ⌈D/BLOCK_D⌉ times, which L2 serves; B and s read once, the gradients written. Of a
mask S·⌈D/32⌉·4 more.
"""

import torch
import triton
import triton.language as tl

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles
from .dropout import drop_threshold, keep_inverse, keep_tile
from .grouped import check_experts, check_index, check_offsets, find_rows, mask_arguments, weight_arguments
from .launch import TL_DTYPES, dot_dtype, launch, launch_options, sum_dtype
from .reduce import check_branches, check_pair


@triton.jit
def gradient_tile(
    acc,  # (BLOCK_D, BLOCK_R), P
    w_ptr,
    scale_ptr,
    dw_ptr,
    ds_ptr,
    carry,  # (BLOCK_D,), what earlier tiles gave to ds of the branch of column start_c
    start_c,
    offs_d,
    D,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_si,
    stride_sd,
    scaling: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LORA_B: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Columns from start_c on of one expert's gradient: dA (R, D), or where LORA_B dB (n, D, r) and ds (n, D), of which
    a branch is stored once its last column is there. Returns the carry of the next tile."""
    offs_c = start_c + tl.arange(0, BLOCK_R)
    mask_d, wide_d = offs_d < D, offs_d.to(tl.int64)
    mask = mask_d[:, None] & (offs_c < R)[None, :]
    i, j = (offs_c // r).to(tl.int64)[None, :], (offs_c % r).to(tl.int64)[None, :]
    if LORA_B:
        w_ptrs = w_ptr + i * stride_wi + j * stride_wj + wide_d[:, None] * stride_wd
        product = tl.load(w_ptrs, mask=mask, other=0.0).to(ACC) * acc  # [BLOCK_D, BLOCK_R]
        for b in range(start_c // r, tl.cdiv(min(start_c + BLOCK_R, R), r)):
            ds = tl.sum(tl.where(i == b, product, 0.0), axis=1)
            carry = tl.where(b * r < start_c, ds + carry, ds)
            tl.store(ds_ptr + b * D + wide_d, scaling * carry, mask=mask_d & ((b + 1) * r <= start_c + BLOCK_R))
        factor = tl.full((1, 1), scaling, ACC)
        if HAS_SCALE:
            s_ptrs = scale_ptr + i * stride_si + wide_d[:, None] * stride_sd
            factor = scaling * tl.load(s_ptrs, mask=mask, other=0.0).to(ACC)  # [BLOCK_D, BLOCK_R]
        acc *= factor
        dw_ptrs = dw_ptr + (i * D + wide_d[:, None]) * r + j
    else:
        dw_ptrs = dw_ptr + offs_c.to(tl.int64)[None, :] * D + wide_d[:, None]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask)
    return carry


@triton.jit(do_not_specialize=["mask_rows", "threshold"])
def grouped_reduce_kernel(
    z_ptr,  # (T, D)
    h_ptr,  # (S, R)
    w_ptr,  # lora_B as (E, n, r, D), any strides, or None where the gradient is lora_A's
    scale_ptr,  # (E, n, D), any strides, or None
    dw_ptr,  # (E, n, D, r), or (E, n, r, D) for lora_A
    ds_ptr,  # (E, n, D), or None for lora_A
    offs_ptr,  # (E,)
    index_ptr,  # (S,), or None where T is S
    ids_ptr,  # (S,), or None where row s of the mask is that of row s
    bits_ptr,  # (mask_rows, ⌈D/32⌉) or None
    D,
    mask_rows,
    threshold,
    stride_zm,
    stride_hm,
    stride_we,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_se,
    stride_si,
    stride_sd,
    stride_bits,
    scaling: tl.constexpr,
    n: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LORA_B: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
):
    e = tl.program_id(1)
    start_m = tl.load(offs_ptr + e - 1, mask=e > 0, other=0)
    end_m = tl.load(offs_ptr + e)
    start_d = tl.program_id(0) * BLOCK_D
    offs_d = start_d + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[:, None]
    wide_e = e.to(tl.int64)
    dw_ptr += wide_e * R * D
    if LORA_B:
        w_ptr += wide_e * stride_we
        ds_ptr += wide_e * n * D
    if HAS_SCALE:
        scale_ptr += wide_e * stride_se
    carry = tl.zeros((BLOCK_D,), ACC)
    for start_c in range(0, R, BLOCK_R + BLOCK_R2):
        offs_c = start_c + tl.arange(0, BLOCK_R)
        mask_c = (offs_c < R)[None, :]
        acc = tl.zeros((BLOCK_D, BLOCK_R), ACC)
        if BLOCK_R2 > 0:
            offs_c2 = start_c + BLOCK_R + tl.arange(0, BLOCK_R2)
            mask_c2 = (offs_c2 < R)[None, :]
            acc2 = tl.zeros((BLOCK_D, BLOCK_R2), ACC)
        for tile_m in range(start_m, end_m, BLOCK_M):
            offs_m = tile_m + tl.arange(0, BLOCK_M)
            mask_m = offs_m < end_m
            z_ptrs = z_ptr + offs_d[:, None] + find_rows(index_ptr, offs_m, mask_m)[None, :] * stride_zm
            z = tl.load(z_ptrs, mask=mask_d & mask_m[None, :], other=0.0).to(DOT)  # [BLOCK_D, BLOCK_M]
            if DROPOUT:
                mask_m_rows = find_rows(ids_ptr, offs_m, mask_m)
                keep = keep_tile(bits_ptr, mask_m_rows, start_d, mask_rows, stride_bits, BLOCK_M, BLOCK_D)
                z = tl.where(tl.trans(keep), z, 0.0).to(DOT)  # [BLOCK_D, BLOCK_M]
            h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
            h = tl.load(h_ptrs + offs_c[None, :], mask=mask_m[:, None] & mask_c, other=0.0).to(DOT)
            acc = tl.dot(z, h, acc, input_precision="ieee", out_dtype=ACC)
            if BLOCK_R2 > 0:
                h2 = tl.load(h_ptrs + offs_c2[None, :], mask=mask_m[:, None] & mask_c2, other=0.0).to(DOT)
                acc2 = tl.dot(z, h2, acc2, input_precision="ieee", out_dtype=ACC)
        if DROPOUT:
            acc *= keep_inverse(threshold, ACC)
        carry = gradient_tile(
            acc, w_ptr, scale_ptr, dw_ptr, ds_ptr, carry, start_c, offs_d, D,
            stride_wi, stride_wj, stride_wd, stride_si, stride_sd, scaling, r, R, HAS_SCALE, LORA_B, ACC, BLOCK_R,
        )  # fmt: skip
        if BLOCK_R2 > 0:
            if DROPOUT:
                acc2 *= keep_inverse(threshold, ACC)
            carry = gradient_tile(
                acc2, w_ptr, scale_ptr, dw_ptr, ds_ptr, carry, start_c + BLOCK_R, offs_d, D,
                stride_wi, stride_wj, stride_wd, stride_si, stride_sd, scaling, r, R, HAS_SCALE, LORA_B, ACC, BLOCK_R2,
            )  # fmt: skip


def _sum_rows(h, z, w, scale, scaling, dw, ds, offs, n, index, mask, p, config):
    """The gradients into dw and ds; w and ds are None where it is lora_A's."""
    R, D, E = h.shape[1], z.shape[1], offs.numel()
    arch, _ = device_of(z)
    config = config or pick("grouped_reduce", h.shape[0] // E, R, z.dtype, arch, dropout=mask["DROPOUT"])
    block_r, block_r2 = rank_tiles(R, config)
    launch(
        z, grouped_reduce_kernel, (cdiv(D, config.BLOCK_D), E),
        z_ptr=z, h_ptr=h, dw_ptr=dw, ds_ptr=ds, offs_ptr=offs, index_ptr=index, D=D, threshold=drop_threshold(p),
        stride_zm=z.stride(0), stride_hm=h.stride(0), **weight_arguments(w, scale), **mask,
        scaling=float(scaling), n=n, r=R // n, R=R, LORA_B=w is not None,
        DOT=dot_dtype(z.dtype), ACC=TL_DTYPES[sum_dtype(z.dtype)], BLOCK_M=config.BLOCK_M, BLOCK_D=config.BLOCK_D,
        BLOCK_R=block_r, BLOCK_R2=block_r2, **launch_options(config),
    )  # fmt: skip


def grouped_reduce(
    h: torch.Tensor,
    x: torch.Tensor,
    offs: torch.Tensor,
    n: int,
    dtype: torch.dtype,
    index: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    bits: torch.Tensor | None = None,
    p: float = 0.0,
    config: KernelConfig | None = None,
) -> torch.Tensor:
    """dA_e = hᵀ x̂ over each expert's rows as (E, n, r, D) in `dtype`, from h (S, n·r) and offs (E,) int32.

    Row s goes with row index[s] of x (T, D), index being int64 (S,), or without index with row s of x (S, D). x̂ is x
    after the dropout of `bits` and p, of which row ids[s], or without ids row s, is that of row s. Raises ValueError
    for shapes or dtypes that do not agree or p outside [0, 1).
    """
    h, x = check_pair(h, x, "x", S=None if index is None else index.numel())
    (S, R), D = h.shape, x.shape[1]
    check_branches(n, R)
    check_index("index", index, S)
    mask, E = mask_arguments(bits, ids, S, D), check_offsets(offs)
    drop_threshold(p)
    da = torch.empty((E, n, R // n, D), dtype=dtype, device=x.device)
    if da.numel() > 0 and not da.is_meta:
        _sum_rows(h, x, None, None, 1.0, da, None, offs, n, index, mask, p, config)
    return da


def grouped_reduce_scaled(
    h: torch.Tensor,
    dy: torch.Tensor,
    w: torch.Tensor,
    offs: torch.Tensor,
    scale: torch.Tensor | None,
    scaling: float = 1.0,
    config: KernelConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dB, ds) over each expert's rows, from h (S, n·r), dy (S, N), w (E, n, r, N), being lora_B transposed, offs (E,)
    int32, and scale None (all ones) or (E, n, N).

    dB is (E, n, N, r) in w's dtype. ds is (E, n, N) in float32 (float64 for float64 dy), for a scalar scale still to be
    summed over N. Raises ValueError for shapes or dtypes that do not agree.
    """
    check_experts(w, scale, dy.shape[-1])
    E, n, r, N = w.shape
    h, dy = check_pair(h, dy, "dy", n * r)
    check_offsets(offs, E)
    db = torch.empty((E, n, N, r), dtype=w.dtype, device=dy.device)
    ds = torch.empty((E, n, N), dtype=sum_dtype(dy.dtype), device=dy.device)
    if db.numel() > 0 and not db.is_meta:
        mask = mask_arguments(None, None, *dy.shape)
        _sum_rows(h, dy, w, scale, scaling, db, ds, offs, n, None, mask, 0.0, config)
    return db, ds
