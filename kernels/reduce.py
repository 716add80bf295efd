"""reduce over tokens: dÃ = dHᵀ x̂, and P = dyᵀ H with dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ) as its epilogue.

    P[d, c] = Σ_m z[m, d] · h[m, c]        z = x̂ or dy

The first kernel sums a part of the tokens for BLOCK_D features and as many of the R columns as its configuration holds
(256 or 512), so z is read once; where that is not all of R, the programs of one tile of z are neighbours and the later
ones find it in L2. It accumulates (D, R), which stays on the tensor cores however few columns there are. The second,
in finish.py, adds the parts in order, for one gradient or for both.

Bytes: z read once, h ⌈D/BLOCK_D⌉ times, which L2 serves; S parts of D·R·4 written. Of a mask M·⌈D/32⌉·4 more.
"""

import torch
import triton
import triton.language as tl

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles, split_k
from .dropout import check_bits, drop_threshold, keep_inverse, keep_tile
from .finish import finish
from .launch import TL_DTYPES, check_weight, dot_dtype, launch, launch_options, rows, sum_dtype


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def reduce_kernel(
    z_ptr,  # (M, D)
    h_ptr,  # (M, R)
    parts_ptr,  # (S, D, R)
    bits_ptr,  # (M, ⌈D/32⌉) or None
    M,
    D,
    steps,  # tiles of tokens in a part
    threshold,
    stride_zm,
    stride_hm,
    stride_bits,
    R: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
):
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
    offs_t = tl.arange(0, BLOCK_M)
    z_offs = offs_d[:, None] + offs_t.to(tl.int64)[None, :] * stride_zm
    h_offs = offs_t.to(tl.int64)[:, None] * stride_hm
    for step in range(steps):
        start_m = (part * steps + step).to(tl.int64) * BLOCK_M
        mask_m = offs_t < tl.minimum(M - start_m, BLOCK_M).to(tl.int32)
        z_ptrs = z_ptr + start_m * stride_zm + z_offs
        # Read as it is multiplied: where a masked z is turned afterwards, Triton 3.6 fails to pipeline its two products
        # on sm_100.
        z = tl.load(z_ptrs, mask=mask_d[:, None] & mask_m[None, :], other=0.0).to(DOT)  # [BLOCK_D, BLOCK_M]
        if DROPOUT:
            keep = keep_tile(bits_ptr, start_m + offs_t, start_d, M, stride_bits, BLOCK_M, BLOCK_D)
            z = tl.where(tl.trans(keep), z, 0.0).to(DOT)  # [BLOCK_D, BLOCK_M]
        h_ptrs = h_ptr + start_m * stride_hm + h_offs
        h = tl.load(h_ptrs + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(
            DOT
        )  # [BLOCK_M, BLOCK_R]
        acc = tl.dot(z, h, acc, input_precision="ieee", out_dtype=ACC)
        if BLOCK_R2 > 0:
            h2 = tl.load(h_ptrs + offs_c2[None, :], mask=mask_m[:, None] & mask_c2[None, :], other=0.0).to(DOT)
            acc2 = tl.dot(z, h2, acc2, input_precision="ieee", out_dtype=ACC)
    out_ptrs = parts_ptr + (part.to(tl.int64) * D + offs_d)[:, None] * R
    if DROPOUT:
        acc *= keep_inverse(threshold, ACC)
    tl.store(out_ptrs + offs_c[None, :], acc, mask=mask_d[:, None] & mask_c[None, :])
    if BLOCK_R2 > 0:
        if DROPOUT:
            acc2 *= keep_inverse(threshold, ACC)
        tl.store(out_ptrs + offs_c2[None, :], acc2, mask=mask_d[:, None] & mask_c2[None, :])


def _sum_tokens(h, z, bits, p, config):
    """The parts (S, D, R) of zᵀ h in the accumulator's dtype."""
    (M, R), D = h.shape, z.shape[1]
    dropout, (arch, processors) = bits is not None, device_of(z)
    config = config or pick("reduce", M, R, z.dtype, arch, dropout=dropout)
    block_r, block_r2 = rank_tiles(R, config)
    tiles = cdiv(D, config.BLOCK_D) * cdiv(R, block_r + block_r2)
    parts, steps = split_k(tiles, cdiv(M, config.BLOCK_M), processors * config.programs, config.min_steps)
    sums = sum_dtype(z.dtype)
    out = torch.empty((parts, D, R), dtype=sums, device=z.device)
    launch(
        z, reduce_kernel, (tiles, parts),
        z_ptr=z, h_ptr=h, parts_ptr=out, bits_ptr=bits, M=M, D=D, steps=steps, threshold=drop_threshold(p),
        stride_zm=z.stride(0), stride_hm=h.stride(0), stride_bits=bits.shape[1] if dropout else 0,
        R=R, DROPOUT=dropout, DOT=dot_dtype(z.dtype), ACC=TL_DTYPES[sums],
        BLOCK_M=config.BLOCK_M, BLOCK_D=config.BLOCK_D, BLOCK_R=block_r, BLOCK_R2=block_r2, **launch_options(config),
    )  # fmt: skip
    return out


def check_pair(h, z, name, R=None, S=None):
    """h has R columns, and the rows of z or, where z is read by index, S of them."""
    h, z = rows("h", h), rows(name, z)
    S = z.shape[0] if S is None else S
    if h.shape[0] != S or h.dtype != z.dtype:
        raise ValueError(
            f"h has shape {tuple(h.shape)} and dtype {h.dtype}, wanted {S} rows of {z.dtype} as {name} has."
        )
    if R is not None and h.shape[1] != R:
        raise ValueError(f"h has {h.shape[1]} columns, wanted {R}.")
    return h, z


def check_branches(n: int, R: int) -> None:
    if not 1 <= n <= R or R % n:
        raise ValueError(f"n is {n}, wanted a divisor of the {R} columns of h.")


def _outputs_b(dy, w, scale):
    check_weight(w, scale, dy.shape[1])
    n, r, N = w.shape
    db = torch.empty((n, N, r), dtype=w.dtype, device=dy.device)
    return db, torch.empty((n, N), dtype=sum_dtype(dy.dtype), device=dy.device)


def _runs(out: torch.Tensor) -> bool:
    return out.numel() > 0 and not out.is_meta


def reduce(
    h: torch.Tensor,
    x: torch.Tensor,
    n: int,
    dtype: torch.dtype,
    bits: torch.Tensor | None = None,
    p: float = 0.0,
    config: KernelConfig | None = None,
) -> torch.Tensor:
    """dA = hᵀ x̂ as (n, r, D) in `dtype`, from h (M, n·r) and x (M, D); x̂ is x after the dropout of `bits` and p.

    Raises ValueError for shapes or dtypes that do not agree or p outside [0, 1).
    """
    h, x = check_pair(h, x, "x")
    check_branches(n, h.shape[1])
    check_bits(bits, *x.shape)
    da = torch.empty((n, h.shape[1] // n, x.shape[1]), dtype=dtype, device=x.device)
    if _runs(da):
        finish(None, None, None, 1.0, None, None, _sum_tokens(h, x, bits, p, config), da)
    return da


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
    db, ds = _outputs_b(dy, w, scale)
    h, dy = check_pair(h, dy, "dy", w.shape[0] * w.shape[1])
    if _runs(db):
        finish(_sum_tokens(h, dy, None, 0.0, config), w, scale, scaling, db, ds, None, None)
    return db, ds


def reduce_all(
    h: torch.Tensor,
    dy: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None,
    scaling: float,
    dh: torch.Tensor,
    x: torch.Tensor,
    dtype: torch.dtype,
    bits: torch.Tensor | None = None,
    p: float = 0.0,
    config: KernelConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dB, ds, dA) of `reduce_scaled(h, dy, w, scale, scaling)` and `reduce(dh, x, n, dtype, bits, p)`, the same bits,
    with one second pass for both."""
    n, r, _ = w.shape
    db, ds = _outputs_b(dy, w, scale)
    h, dy = check_pair(h, dy, "dy", n * r)
    dh, x = check_pair(dh, x, "x", n * r)
    check_bits(bits, *x.shape)
    da = torch.empty((n, r, x.shape[1]), dtype=dtype, device=x.device)
    if _runs(db) and _runs(da):
        parts_b, parts_a = _sum_tokens(h, dy, None, 0.0, config), _sum_tokens(dh, x, bits, p, config)
        finish(parts_b, w, scale, scaling, db, ds, parts_a, da)
        return db, ds, da
    return *reduce_scaled(h, dy, w, scale, scaling, config), reduce(dh, x, n, dtype, bits, p, config)
