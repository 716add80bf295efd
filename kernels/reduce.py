"""reduce over tokens: dÃ = dHᵀ x̂, and P = dyᵀ H with dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ) as its epilogue.

    P[d, c] = Σ_m z[m, d] · h[m, c]        z = x̂ or dy

The first kernel sums a part of the tokens for BLOCK_D features and as many of the R columns as its configuration holds
(256 or 512), so z is read once; where that is not all of R, the programs of one tile of z are neighbours and the later
ones find it in L2. It accumulates (D, R), which stays on the tensor cores however few columns there are. The second
adds the parts in order.
"""

import torch
import triton
import triton.language as tl

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles, split_k
from .dropout import check_seed, drop_threshold, keep_inverse, keep_tile
from .launch import TL_DTYPES, check_weight, dot_dtype, launch, launch_options, rows, strides, sum_dtype


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def reduce_kernel(
    z_ptr, h_ptr, parts_ptr, seed_ptr, M, D, steps, threshold, stride_zm, stride_hm,
    R: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_R2: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    pid, part = tl.program_id(0), tl.program_id(1)
    start_d = (pid // chunks) * BLOCK_D
    start_c = (pid % chunks) * (BLOCK_R + BLOCK_R2)
    offs_d = start_d + tl.arange(0, BLOCK_D)
    offs_c = start_c + tl.arange(0, BLOCK_R)
    mask_d, mask_c = offs_d < D, offs_c < R
    acc = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    if BLOCK_R2 > 0:
        offs_c2 = start_c + BLOCK_R + tl.arange(0, BLOCK_R2)
        mask_c2 = offs_c2 < R
        acc2 = tl.zeros((BLOCK_D, BLOCK_R2), ACC)
    for step in range(steps):
        offs_m = (part * steps + step).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < M)[:, None]
        z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_d[None, :]
        z = tl.load(z_ptrs, mask=mask_m & mask_d[None, :], other=0.0).to(DOT)
        if DROPOUT:
            keep = keep_tile(seed_ptr, offs_m, start_d, D, threshold, BLOCK_D)
            z = tl.where(keep, z, 0.0).to(DOT)
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm
        h = tl.load(h_ptrs + offs_c[None, :], mask=mask_m & mask_c[None, :], other=0.0).to(DOT)
        acc = tl.dot(tl.trans(z), h, acc, input_precision="ieee", out_dtype=ACC)
        if BLOCK_R2 > 0:
            h2 = tl.load(h_ptrs + offs_c2[None, :], mask=mask_m & mask_c2[None, :], other=0.0).to(DOT)
            acc2 = tl.dot(tl.trans(z), h2, acc2, input_precision="ieee", out_dtype=ACC)
    out_ptrs = parts_ptr + (part.to(tl.int64) * D + offs_d)[:, None] * R
    if DROPOUT:
        acc *= keep_inverse(threshold, ACC)
    tl.store(out_ptrs + offs_c[None, :], acc, mask=mask_d[:, None] & mask_c[None, :])
    if BLOCK_R2 > 0:
        if DROPOUT:
            acc2 *= keep_inverse(threshold, ACC)
        tl.store(out_ptrs + offs_c2[None, :], acc2, mask=mask_d[:, None] & mask_c2[None, :])


@triton.jit(do_not_specialize=["parts"])
def finish_kernel(
    parts_ptr, w_ptr, scale_ptr, dw_ptr, ds_ptr, D, parts, stride_part,
    stride_wi, stride_wj, stride_wd, stride_si, stride_sd, stride_oi, stride_oj, stride_od,
    scaling: tl.constexpr, r: tl.constexpr, R: tl.constexpr, HAS_SCALE: tl.constexpr, WANT_SCALE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """For branch i: P_i = Σ_s parts[s] in order, dw_i = scaling·scale_i ⊙ P_i, ds_i = scaling·rowsum(w_i ⊙ P_i)."""
    i = tl.program_id(1).to(tl.int64)
    offs_d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    factor = tl.full((BLOCK_D,), scaling, ACC)
    if HAS_SCALE:
        factor *= tl.load(scale_ptr + i * stride_si + offs_d * stride_sd, mask=mask_d, other=0.0).to(ACC)
    ds = tl.zeros((BLOCK_D,), ACC)
    for start_j in range(0, r, BLOCK_R):
        offs_j = start_j + tl.arange(0, BLOCK_R)
        mask = mask_d[:, None] & (offs_j < r)[None, :]
        ptrs = parts_ptr + offs_d[:, None] * R + (i * r + offs_j)[None, :]
        total = tl.zeros((BLOCK_D, BLOCK_R), ACC)
        for _ in range(parts):
            total += tl.load(ptrs, mask=mask, other=0.0)
            ptrs += stride_part
        if WANT_SCALE:
            w_ptrs = w_ptr + i * stride_wi + offs_j.to(tl.int64)[None, :] * stride_wj + offs_d[:, None] * stride_wd
            ds += tl.sum(tl.load(w_ptrs, mask=mask, other=0.0).to(ACC) * total, axis=1)
        dw_ptrs = dw_ptr + i * stride_oi + offs_j.to(tl.int64)[None, :] * stride_oj + offs_d[:, None] * stride_od
        tl.store(dw_ptrs, (factor[:, None] * total).to(dw_ptr.dtype.element_ty), mask=mask)
    if WANT_SCALE:
        tl.store(ds_ptr + i * D + offs_d, ds * scaling, mask=mask_d)


def _sum_tokens(h, z, seed, p, dropout, config):
    """The parts (S, D, R) of zᵀ h in the accumulator's dtype."""
    (M, R), D = h.shape, z.shape[1]
    arch, processors = device_of(z)
    config = config or pick("reduce", M, R, z.dtype, arch)
    block_r, block_r2 = rank_tiles(R, config)
    tiles = cdiv(D, config.BLOCK_D) * cdiv(R, block_r + block_r2)
    parts, steps = split_k(tiles, cdiv(M, config.BLOCK_M), processors, config.min_steps)
    sums = sum_dtype(z.dtype)
    out = torch.empty((parts, D, R), dtype=sums, device=z.device)
    launch(
        z, reduce_kernel, (tiles, parts),
        z_ptr=z, h_ptr=h, parts_ptr=out, seed_ptr=seed if dropout else None, M=M, D=D, steps=steps,
        threshold=drop_threshold(p), stride_zm=z.stride(0), stride_hm=h.stride(0), R=R, DROPOUT=dropout,
        DOT=dot_dtype(z.dtype), ACC=TL_DTYPES[sums], BLOCK_M=config.BLOCK_M, BLOCK_D=config.BLOCK_D,
        BLOCK_R=block_r, BLOCK_R2=block_r2, **launch_options(config),
    )  # fmt: skip
    return out


def _finish(parts, dw, w, scale, scaling, ds):
    """The second pass into dw (n, r, D) of any strides and, where wanted, ds (n, D)."""
    n, r, D = dw.shape
    BLOCK_D, BLOCK_R = 32, 16 if r <= 16 else 32
    stride_wi, stride_wj, stride_wd = strides(w, 3)
    stride_si, stride_sd = strides(scale, 2)
    stride_oi, stride_oj, stride_od = dw.stride()
    launch(
        parts, finish_kernel, (cdiv(D, BLOCK_D), n),
        parts_ptr=parts, w_ptr=w, scale_ptr=scale, dw_ptr=dw, ds_ptr=ds, D=D, parts=parts.shape[0],
        stride_part=parts.stride(0),
        stride_wi=stride_wi, stride_wj=stride_wj, stride_wd=stride_wd, stride_si=stride_si, stride_sd=stride_sd,
        stride_oi=stride_oi, stride_oj=stride_oj, stride_od=stride_od,
        scaling=float(scaling), r=r, R=n * r, HAS_SCALE=scale is not None, WANT_SCALE=ds is not None,
        ACC=TL_DTYPES[parts.dtype], BLOCK_D=BLOCK_D, BLOCK_R=BLOCK_R, num_warps=4,
    )  # fmt: skip


def _check_pair(h, z, name):
    h, z = rows("h", h), rows(name, z)
    if h.shape[0] != z.shape[0] or h.dtype != z.dtype:
        raise ValueError(
            f"h has shape {tuple(h.shape)} and dtype {h.dtype}, wanted {z.shape[0]} rows of {z.dtype} as {name} has."
        )
    return h, z


def reduce(
    h: torch.Tensor,
    x: torch.Tensor,
    n: int,
    dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    config: KernelConfig | None = None,
) -> torch.Tensor:
    """hᵀ x̂ as (n, r, D) in `dtype`, from h (M, n·r) and x (M, D); x̂ is x after the dropout of `seed` and p.

    Raises ValueError for shapes or dtypes that do not agree, p outside [0, 1) or a seed that is not one int64 element.
    """
    h, x = _check_pair(h, x, "x")
    if n < 1 or h.shape[1] < n or h.shape[1] % n:
        raise ValueError(f"n is {n}, wanted a divisor of the {h.shape[1]} columns of h.")
    dropout = check_seed(seed, p)
    out = torch.empty((n, h.shape[1] // n, x.shape[1]), dtype=dtype, device=x.device)
    if out.numel() == 0 or out.is_meta:
        return out
    _finish(_sum_tokens(h, x, seed, p, dropout, config), out, None, None, 1.0, None)
    return out


def reduce_scaled(
    h: torch.Tensor,
    dy: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None,
    scaling: float = 1.0,
    config: KernelConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dB, ds) from h (M, n·r), dy (M, N), w (n, r, N), being lora_B transposed, and scale None (all ones) or (n, N).

    dB is (n, N, r) in w's dtype. ds is (n, N) in float32 (float64 for float64 dy), for a scalar scale still to be
    summed over N. Raises ValueError for shapes or dtypes that do not agree.
    """
    h, dy = _check_pair(h, dy, "dy")
    check_weight(w, scale, dy.shape[1])
    n, r, N = w.shape
    if h.shape[1] != n * r:
        raise ValueError(f"h has {h.shape[1]} columns, wanted {n * r}.")
    dw = torch.empty((n, N, r), dtype=w.dtype, device=dy.device)
    ds = torch.empty((n, N), dtype=sum_dtype(dy.dtype), device=dy.device)
    if dw.numel() == 0 or dw.is_meta:
        return dw, ds
    _finish(_sum_tokens(h, dy, None, 0.0, False, config), dw.transpose(1, 2), w, scale, scaling, ds)
    return dw, ds
