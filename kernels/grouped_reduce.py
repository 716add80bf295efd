"""reduce by experts: dÃ_e = dHᵀ x̂, and P = dyᵀ H with dB = c·s ⊙ P, ds = c·rowsum(B ⊙ P), over each expert's rows.

One program sums all rows of one expert for BLOCK_D features and has P in registers then: the gradients are written from
them, with no parts, no second pass and no atomics. A rank larger than its configuration holds runs in chunks, one after
the other in the same program. An expert without rows gets zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles
from .dropout import keep_inverse
from .grouped import check_vector, find_rows, grouped_mask
from .launch import check_weight, launch, sum_dtype, tile_arguments
from .pack import weight_arguments
from .reduce import check_pair, input_tile
from .tiles import dot, head_tile


@triton.jit
def gradient_tile(
    acc,  # P [BLOCK_D, BLOCK_R]
    carry,  # [BLOCK_D], what earlier tiles gave to ds of the branch of column start_c
    dw_ptr, ds_ptr,
    weight,  # as weight_tile takes it, but w None for lora_A
    start_c, offs_d, D,
    scaling: tl.constexpr, r: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores columns from start_c on of one expert's gradient: dB [n, D, r] and ds [n, D], or for lora_A dA [R, D].

    A branch of ds is stored once its last column is there. Returns the carry of the next tile.
    """
    w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd = weight
    offs_c = start_c + tl.arange(0, BLOCK_R)
    mask_d, wide_d = offs_d < D, offs_d.to(tl.int64)
    mask = mask_d[:, None] & (offs_c < R)[None, :]
    i, j = (offs_c // r).to(tl.int64)[None, :], (offs_c % r).to(tl.int64)[None, :]
    if w_ptr is not None:
        w_ptrs = w_ptr + i * stride_wi + j * stride_wj + wide_d[:, None] * stride_wd
        product = tl.load(w_ptrs, mask=mask, other=0.0).to(acc.dtype) * acc  # [BLOCK_D, BLOCK_R]
        for b in range(start_c // r, tl.cdiv(min(start_c + BLOCK_R, R), r)):
            ds = tl.sum(tl.where(i == b, product, 0.0), axis=1)
            carry = tl.where(b * r < start_c, ds + carry, ds)
            tl.store(ds_ptr + b * D + wide_d, scaling * carry, mask=mask_d & ((b + 1) * r <= start_c + BLOCK_R))
        factor = tl.full((1, 1), scaling, acc.dtype)
        if scale_ptr is not None:
            s_ptrs = scale_ptr + i * stride_si + wide_d[:, None] * stride_sd
            factor = scaling * tl.load(s_ptrs, mask=mask, other=0.0).to(acc.dtype)  # [BLOCK_D, BLOCK_R]
        acc *= factor
        dw_ptrs = dw_ptr + (i * D + wide_d[:, None]) * r + j
    else:
        dw_ptrs = dw_ptr + offs_c.to(tl.int64)[None, :] * D + wide_d[:, None]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask)
    return carry


@triton.jit(do_not_specialize=["mask_rows", "threshold"])
def grouped_reduce_kernel(
    z_ptr, stride_zm,  # z [T, D], which is x or dy
    h_ptr, stride_hm,  # H or dH [S, R]
    w_ptr, stride_we, stride_wi, stride_wj, stride_wd,  # lora_B as w [E, n, r, D], or None for the gradient of lora_A
    scale_ptr, stride_se, stride_si, stride_sd,  # scale [E, n, D], or None
    dw_ptr,  # dB [E, n, D, r], or dA [E, n, r, D]
    ds_ptr,  # ds [E, n, D], or None for lora_A
    offs_ptr,  # ends of the experts' rows [E]
    index_ptr,  # rows of z [S], or None where T is S
    ids_ptr,  # rows of the mask [S], or None where they are 0 to S
    bits_ptr, stride_bits,  # mask [mask_rows, ⌈D/32⌉], or None
    mask_rows,
    threshold,  # 65536·p
    D,  # features
    scaling: tl.constexpr,  # the constant factor c
    n: tl.constexpr,  # branches
    r: tl.constexpr,  # rank of a branch
    R: tl.constexpr,  # n·r
    DOT: tl.constexpr,  # dtype of the factors
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
):  # fmt: skip
    """P[e, d, c] = Σ_{s of e} ẑ[index[s], d] · h[s, c],  dA = Pᵀ, or dB = c·s ⊙ P and ds = c·rowsum(B ⊙ P)

    Bytes: z read once a row and chunk, h ⌈D/BLOCK_D⌉ times, which L2 serves; B and s read once, the gradients written.
    A mask adds S·⌈D/32⌉·4.
    """
    mask = (bits_ptr, stride_bits, mask_rows, threshold)
    e = tl.program_id(1)
    start_m = tl.load(offs_ptr + e - 1, mask=e > 0, other=0)
    end_m = tl.load(offs_ptr + e)
    start_d = tl.program_id(0) * BLOCK_D
    offs_d = start_d + tl.arange(0, BLOCK_D)
    wide_e = e.to(tl.int64)
    dw_ptr += wide_e * R * D
    if w_ptr is not None:
        w_ptr += wide_e * stride_we
        ds_ptr += wide_e * n * D
    if scale_ptr is not None:
        scale_ptr += wide_e * stride_se
    weight = (w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd)
    carry = tl.zeros((BLOCK_D,), ACC)
    for start_c in range(0, R, BLOCK_R + BLOCK_R2):
        offs_c = start_c + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_D, BLOCK_R), ACC)
        if BLOCK_R2 > 0:
            offs_c2 = start_c + BLOCK_R + tl.arange(0, BLOCK_R2)
            acc2 = tl.zeros((BLOCK_D, BLOCK_R2), ACC)
        for tile_m in range(start_m, end_m, BLOCK_M):
            offs_m = tile_m + tl.arange(0, BLOCK_M)
            mask_m = offs_m < end_m
            z_ptrs = z_ptr + offs_d[:, None] + find_rows(index_ptr, offs_m, mask_m)[None, :] * stride_zm
            h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
            rows = find_rows(ids_ptr, offs_m, mask_m)
            z = input_tile(z_ptrs, offs_d < D, mask_m, mask, rows, start_d, DOT)  # [BLOCK_D, BLOCK_M]
            acc = dot(z, head_tile(h_ptrs, mask_m[:, None], offs_c, R, DOT), acc)  # [BLOCK_M, BLOCK_R]
            if BLOCK_R2 > 0:
                acc2 = dot(z, head_tile(h_ptrs, mask_m[:, None], offs_c2, R, DOT), acc2)  # [BLOCK_M, BLOCK_R2]
        inverse = keep_inverse(mask, ACC)
        carry = gradient_tile(acc * inverse, carry, dw_ptr, ds_ptr, weight, start_c, offs_d, D, scaling, r, R, BLOCK_R)
        if BLOCK_R2 > 0:
            carry = gradient_tile(
                acc2 * inverse, carry, dw_ptr, ds_ptr, weight, start_c + BLOCK_R, offs_d, D, scaling, r, R, BLOCK_R2
            )


def _sum_rows(h, z, w, scale, scaling, dw, ds, offs, n, index, mask, config) -> None:
    """The gradients into dw and ds; w and ds are None where it is lora_A's."""
    if dw.numel() == 0 or dw.is_meta:
        return
    R, D, E = h.shape[1], z.shape[1], offs.numel()
    arch, dropout = device_of(z)[0], mask["bits_ptr"] is not None
    config = config or pick("grouped_reduce", h.shape[0] // E, R, z.dtype, arch, dropout=dropout)
    launch(
        z, grouped_reduce_kernel, (cdiv(D, config.BLOCK_D), E),
        z_ptr=z, stride_zm=z.stride(0), h_ptr=h, stride_hm=h.stride(0), **weight_arguments(w, scale, 4), dw_ptr=dw,
        ds_ptr=ds, offs_ptr=offs, index_ptr=index, **mask, D=D, scaling=float(scaling), n=n, r=R // n, R=R,
        **tile_arguments(z.dtype, config, rank_tiles(R, config)),
    )  # fmt: skip


def grouped_reduce(
    h: Tensor, x: Tensor, offs: Tensor, n: int, dtype: torch.dtype, index: Tensor | None = None,
    ids: Tensor | None = None, bits: Tensor | None = None, p: float = 0.0, config: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """dA_e = hᵀ x̂ over each expert's rows as (E, n, r, D) in `dtype`, from h (S, n·r) and offs (E,) int32.

    Row s goes with row index[s] of x (T, D), index being int64 (S,), or without index with row s of x (S, D). x̂ is x
    after the dropout of `bits` and p, of which row ids[s], or without ids row s, is that of row s. Raises ValueError
    for shapes or dtypes that do not agree or p outside [0, 1).
    """
    h, x = check_pair(h, x, "x", S=None if index is None else index.numel(), n=n)
    (S, R), D = h.shape, x.shape[1]
    E = max(1, offs.numel())
    check_vector("offs", offs, E, torch.int32)
    check_vector("index", index, S, torch.int64)
    mask = grouped_mask(bits, p, ids, S, D)
    da = torch.empty((E, n, R // n, D), dtype=dtype, device=x.device)
    _sum_rows(h, x, None, None, 1.0, da, None, offs, n, index, mask, config)
    return da


def grouped_reduce_scaled(
    h: Tensor, dy: Tensor, w: Tensor, offs: Tensor, scale: Tensor | None, scaling: float = 1.0,
    config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dB, ds) over each expert's rows, from h (S, n·r), dy (S, N), w (E, n, r, N), being lora_B transposed, offs (E,)
    int32, and scale None (all ones) or (E, n, N).

    dB is (E, n, N, r) in w's dtype. ds is (E, n, N) in float32 (float64 for float64 dy), for a scalar scale still to be
    summed over N. Raises ValueError for shapes or dtypes that do not agree.
    """
    check_weight(w, scale, dy.shape[-1], dims=4)
    E, n, r, N = w.shape
    h, dy = check_pair(h, dy, "dy", n * r)
    check_vector("offs", offs, E, torch.int32)
    db = torch.empty((E, n, N, r), dtype=w.dtype, device=dy.device)
    ds = torch.empty((E, n, N), dtype=sum_dtype(dy.dtype), device=dy.device)
    _sum_rows(h, dy, w, scale, scaling, db, ds, offs, n, None, grouped_mask(None, 0.0, None, *dy.shape), config)
    return db, ds
