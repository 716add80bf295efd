"""shrink: H = x̂ Ãᵀ forward, dH = dy B̃ backward.

    H[m, i·r + j] = Σ_d x̂[m, d] · scaling · scale[i, d] · w[i, j, d]

One program owns BLOCK_M tokens, as many of the R columns as its configuration holds (128 to 512) and a part of D, so x
is read once. Where that is not all of R, the programs of one tile of x are neighbours and the later ones find it in L2.
With few tokens D is split over programs and a second pass adds the parts in order.
"""

import torch
import triton
import triton.language as tl

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles, split_k
from .dropout import check_seed, drop_threshold, keep_inverse, keep_tile
from .launch import TL_DTYPES, check_weight, dot_dtype, launch, launch_options, rows, strides, sum_dtype
from .pack import pack


@triton.jit
def weight_tile(
    w_ptr, scale_ptr, offs_d, offs_c, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
    scaling: tl.constexpr, r: tl.constexpr, R: tl.constexpr, HAS_SCALE: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """scaling·scale⊙w (BLOCK_D, BLOCK_R), column c being row c mod r of branch c // r, multiplied before the cast."""
    i, j = (offs_c // r).to(tl.int64), (offs_c % r).to(tl.int64)
    mask = (offs_d < D)[:, None] & (offs_c < R)[None, :]
    w_ptrs = w_ptr + offs_d.to(tl.int64)[:, None] * stride_wd + (i * stride_wi + j * stride_wj)[None, :]
    w = tl.load(w_ptrs, mask=mask, other=0.0)
    if HAS_SCALE:
        s_ptrs = scale_ptr + offs_d.to(tl.int64)[:, None] * stride_sd + (i * stride_si)[None, :]
        w = w.to(ACC) * (scaling * tl.load(s_ptrs, mask=mask, other=0.0).to(ACC))
    elif scaling != 1.0:
        w = w.to(ACC) * scaling
    return w.to(DOT)


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def shrink_kernel(
    x_ptr, w_ptr, scale_ptr, out_ptr, seed_ptr, M, D, steps, threshold,
    stride_xm, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
    scaling: tl.constexpr, r: tl.constexpr, R: tl.constexpr, HAS_SCALE: tl.constexpr, DROPOUT: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_R2: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    pid, part = tl.program_id(0), tl.program_id(1)
    offs_m = (pid // chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_c = (pid % chunks) * (BLOCK_R + BLOCK_R2)
    offs_c = start_c + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    if BLOCK_R2 > 0:
        offs_c2 = start_c + BLOCK_R + tl.arange(0, BLOCK_R2)
        acc2 = tl.zeros((BLOCK_M, BLOCK_R2), ACC)
    first = part * steps * BLOCK_D
    for start_d in range(first, min(first + steps * BLOCK_D, D), BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptrs + offs_d[None, :], mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0).to(DOT)
        if DROPOUT:
            keep = keep_tile(seed_ptr, offs_m, start_d, D, threshold, BLOCK_D)
            x = tl.where(keep, x, 0.0).to(DOT)
        w = weight_tile(
            w_ptr, scale_ptr, offs_d, offs_c, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
            scaling, r, R, HAS_SCALE, DOT, ACC,
        )  # fmt: skip
        acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=ACC)
        if BLOCK_R2 > 0:
            w2 = weight_tile(
                w_ptr, scale_ptr, offs_d, offs_c2, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
                scaling, r, R, HAS_SCALE, DOT, ACC,
            )  # fmt: skip
            acc2 = tl.dot(x, w2, acc2, input_precision="ieee", out_dtype=ACC)
    if DROPOUT:
        acc *= keep_inverse(threshold, ACC)
    out_ptrs = out_ptr + (part.to(tl.int64) * M + offs_m)[:, None] * R
    mask = mask_m[:, None] & (offs_c < R)[None, :]
    tl.store(out_ptrs + offs_c[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    if BLOCK_R2 > 0:
        if DROPOUT:
            acc2 *= keep_inverse(threshold, ACC)
        mask2 = mask_m[:, None] & (offs_c2 < R)[None, :]
        tl.store(out_ptrs + offs_c2[None, :], acc2.to(out_ptr.dtype.element_ty), mask=mask2)


@triton.jit(do_not_specialize=["size", "parts"])
def sum_parts_kernel(parts_ptr, out_ptr, size, parts, BLOCK: tl.constexpr):
    """out[e] = Σ_s parts[s, e], in order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    ptrs = parts_ptr + offs
    acc = tl.load(ptrs, mask=mask, other=0.0)
    for _ in range(1, parts):
        ptrs += size
        acc += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def shrink(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None = None,
    scaling: float = 1.0,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    config: KernelConfig | None = None,
) -> torch.Tensor:
    """H (M, n·r) in x's dtype, from x (M, D), w (n, r, D) and scale None or (n, D) of any strides.

    Dropout of x is on when `seed` (int64, one element) is given and p > 0. Sums are float32, for float64 x float64.
    Raises ValueError for shapes that do not agree, p outside [0, 1) or a seed that is not one int64 element.
    """
    x = rows("x", x)
    M, D = x.shape
    check_weight(w, scale, D)
    dropout = check_seed(seed, p)
    n, r, _ = w.shape
    R = n * r
    out = torch.empty((M, R), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or out.is_meta:
        return out
    arch, processors = device_of(x)
    config = config or pick("shrink", M, R, x.dtype, arch)
    if config.pack and (scale is not None or scaling != 1.0 or w.dtype != x.dtype or w.stride(2) != 1):
        w, scale, scaling = pack(w, x.dtype, scale, scaling)[None], None, 1.0
    if scale is None and w.stride(0) == w.shape[1] * w.stride(1):
        w = w.reshape(1, R, D)
    stride_wi, stride_wj, stride_wd = w.stride()
    stride_si, stride_sd = strides(scale, 2)
    block_r, block_r2 = rank_tiles(R, config)
    tiles = cdiv(M, config.BLOCK_M) * cdiv(R, block_r + block_r2)
    parts, steps = split_k(tiles, cdiv(D, config.BLOCK_D), processors, config.min_steps)
    sums = sum_dtype(x.dtype)
    target = out if parts == 1 else torch.empty((parts, M, R), dtype=sums, device=x.device)
    launch(
        x, shrink_kernel, (tiles, parts),
        x_ptr=x, w_ptr=w, scale_ptr=scale, out_ptr=target, seed_ptr=seed if dropout else None,
        M=M, D=D, steps=steps, threshold=drop_threshold(p), stride_xm=x.stride(0),
        stride_wi=stride_wi, stride_wj=stride_wj, stride_wd=stride_wd, stride_si=stride_si, stride_sd=stride_sd,
        scaling=float(scaling), r=w.shape[1], R=R, HAS_SCALE=scale is not None, DROPOUT=dropout,
        DOT=dot_dtype(x.dtype), ACC=TL_DTYPES[sums], BLOCK_M=config.BLOCK_M, BLOCK_D=config.BLOCK_D,
        BLOCK_R=block_r, BLOCK_R2=block_r2, **launch_options(config),
    )  # fmt: skip
    if parts > 1:
        launch(
            x, sum_parts_kernel, (cdiv(M * R, 1024), 1),
            parts_ptr=target, out_ptr=out, size=M * R, parts=parts, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return out
