"""reduce over tokens: dÃ = dHᵀ x̂, and P = dyᵀ H with dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ) as its epilogue.

The first kernel sums a part of the tokens for BLOCK_D features and as many of the R columns as its configuration holds
(256 or 512), so z is read once; where that is not all of R, the programs of one tile of z are neighbours and the later
ones find it in L2. It accumulates (D, R), which stays on the tensor cores however few columns there are. The second,
in finish.py, adds the parts in order, for one gradient or for both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles, split_k
from .dropout import keep_inverse, keep_tile, mask_arguments
from .finish import finish
from .launch import check_weight, launch, rows, sum_dtype, tile_arguments
from .tiles import dot, head_tile, store_columns


@triton.jit
def input_tile(z_ptrs, mask_d, mask_m, mask, mask_rows, start_d, DOT: tl.constexpr):
    """z [BLOCK_D, BLOCK_M] in DOT, 0 where the mask drops it."""
    # Read as it is multiplied: where a masked z is turned afterwards, Triton 3.6 fails to pipeline its two products
    # on sm_100.
    z = tl.load(z_ptrs, mask=mask_d[:, None] & mask_m[None, :], other=0.0).to(DOT)  # [BLOCK_D, BLOCK_M]
    if mask[0] is not None:
        keep = keep_tile(mask, mask_rows, start_d, z.shape[1], z.shape[0])
        z = tl.where(tl.trans(keep), z, 0.0).to(DOT)
    return z


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def reduce_kernel(
    z_ptr, stride_zm,  # z [M, D], which is x or dy
    h_ptr, stride_hm,  # H or dH [M, R]
    parts_ptr,  # P in parts [parts, D, R]
    bits_ptr, stride_bits,  # mask [M, ⌈D/32⌉], or None
    threshold,  # 65536·p
    M,  # tokens
    D,  # features
    steps,  # tiles of tokens in a part
    R: tl.constexpr,  # n·r
    DOT: tl.constexpr,  # dtype of the factors
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
):  # fmt: skip
    """P[d, c] = Σ_m ẑ[m, d] · h[m, c], in parts of the tokens

    Bytes: z read once, h ⌈D/BLOCK_D⌉ times, which L2 serves; the parts, D·R·4 each, written. A mask adds M·⌈D/32⌉·4.
    """
    mask = (bits_ptr, stride_bits, M, threshold)
    chunks: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    pid, part = tl.program_id(0), tl.program_id(1)
    start_d = (pid // chunks) * BLOCK_D
    start_c = (pid % chunks) * (BLOCK_R + BLOCK_R2)
    offs_d = start_d + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_c = start_c + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    if BLOCK_R2 > 0:
        offs_c2 = start_c + BLOCK_R + tl.arange(0, BLOCK_R2)
        acc2 = tl.zeros((BLOCK_D, BLOCK_R2), ACC)
    offs_t = tl.arange(0, BLOCK_M)
    z_offs = offs_d[:, None] + offs_t.to(tl.int64)[None, :] * stride_zm
    h_offs = offs_t.to(tl.int64)[:, None] * stride_hm
    for step in range(steps):
        start_m = (part * steps + step).to(tl.int64) * BLOCK_M
        mask_m = offs_t < tl.minimum(M - start_m, BLOCK_M).to(tl.int32)
        z_ptrs, h_ptrs = z_ptr + start_m * stride_zm + z_offs, h_ptr + start_m * stride_hm + h_offs
        z = input_tile(z_ptrs, mask_d, mask_m, mask, start_m + offs_t, start_d, DOT)  # [BLOCK_D, BLOCK_M]
        acc = dot(z, head_tile(h_ptrs, mask_m[:, None], offs_c, R, DOT), acc)  # [BLOCK_M, BLOCK_R]
        if BLOCK_R2 > 0:
            acc2 = dot(z, head_tile(h_ptrs, mask_m[:, None], offs_c2, R, DOT), acc2)  # [BLOCK_M, BLOCK_R2]
    out_ptrs = parts_ptr + (part.to(tl.int64) * D + offs_d)[:, None] * R
    inverse = keep_inverse(mask, ACC)
    store_columns(out_ptrs, mask_d[:, None], offs_c, acc * inverse, R)
    if BLOCK_R2 > 0:
        store_columns(out_ptrs, mask_d[:, None], offs_c2, acc2 * inverse, R)


def check_pair(h, z, name, R=None, S=None, n=1):
    """h has R columns, those of n branches, and the rows of z or, where z is read by index, S of them."""
    h, z = rows("h", h), rows(name, z)
    S = z.shape[0] if S is None else S
    if h.shape[0] != S or h.dtype != z.dtype:
        raise ValueError(
            f"h has shape {tuple(h.shape)} and dtype {h.dtype}, wanted {S} rows of {z.dtype} as {name} has."
        )
    if R is not None and h.shape[1] != R:
        raise ValueError(f"h has {h.shape[1]} columns, wanted {R}.")
    if not 1 <= n <= h.shape[1] or h.shape[1] % n:
        raise ValueError(f"n is {n}, wanted a divisor of the {h.shape[1]} columns of h.")
    return h, z


def _sum_tokens(h, z, bits, p, config) -> Tensor | None:
    """The parts (S, D, R) of ẑᵀ h in the accumulator's dtype, None where there is nothing to run."""
    mask = mask_arguments(bits, p, *z.shape)
    if z.shape[1] == 0 or z.is_meta:
        return None
    (M, R), D, (arch, processors) = h.shape, z.shape[1], device_of(z)
    config = config or pick("reduce", M, R, z.dtype, arch, dropout=bits is not None)
    blocks = rank_tiles(R, config)
    tiles = cdiv(D, config.BLOCK_D) * cdiv(R, sum(blocks))
    parts, steps = split_k(tiles, cdiv(M, config.BLOCK_M), processors * config.programs, config.min_steps)
    out = torch.empty((parts, D, R), dtype=sum_dtype(z.dtype), device=z.device)
    launch(
        z, reduce_kernel, (tiles, parts), z_ptr=z, stride_zm=z.stride(0), h_ptr=h, stride_hm=h.stride(0), parts_ptr=out,
        **mask, M=M, D=D, steps=steps, R=R, **tile_arguments(z.dtype, config, blocks),
    )  # fmt: skip
    return out


def _parts_a(h, x, n, dtype, bits, p, config, R=None):
    """The parts of dA, and where it goes."""
    h, x = check_pair(h, x, "x", R, n=n)
    da = torch.empty((n, h.shape[1] // n, x.shape[1]), dtype=dtype, device=x.device)
    return _sum_tokens(h, x, bits, p, config), da


def _parts_b(h, dy, w, scale, config):
    """The parts of P, and where dB and ds go."""
    check_weight(w, scale, dy.shape[1])
    n, r, N = w.shape
    h, dy = check_pair(h, dy, "dy", n * r)
    db = torch.empty((n, N, r), dtype=w.dtype, device=dy.device)
    ds = torch.empty((n, N), dtype=sum_dtype(dy.dtype), device=dy.device)
    return _sum_tokens(h, dy, None, 0.0, config), db, ds


def reduce(
    h: Tensor, x: Tensor, n: int, dtype: torch.dtype, bits: Tensor | None = None, p: float = 0.0,
    config: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """dA = hᵀ x̂ as (n, r, D) in `dtype`, from h (M, n·r) and x (M, D); x̂ is x after the dropout of `bits` and p.

    Raises ValueError for shapes or dtypes that do not agree or p outside [0, 1).
    """
    parts, da = _parts_a(h, x, n, dtype, bits, p, config)
    finish(parts_a=parts, da=da)
    return da


def reduce_scaled(
    h: Tensor, dy: Tensor, w: Tensor, scale: Tensor | None, scaling: float = 1.0, config: KernelConfig | None = None
) -> tuple[Tensor, Tensor]:
    """(dB, ds) from h (M, n·r), dy (M, N), w (n, r, N), being lora_B transposed, and scale None (all ones) or (n, N).

    dB is (n, N, r) in w's dtype. ds is (n, N) in float32 (float64 for float64 dy), for a scalar scale still to be
    summed over N. Raises ValueError for shapes or dtypes that do not agree.
    """
    parts, db, ds = _parts_b(h, dy, w, scale, config)
    finish(parts, w, scale, scaling, db, ds)
    return db, ds


def reduce_all(
    h: Tensor, dy: Tensor, w: Tensor, scale: Tensor | None, scaling: float, dh: Tensor, x: Tensor, dtype: torch.dtype,
    bits: Tensor | None = None, p: float = 0.0, config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dB, ds, dA) of `reduce_scaled(h, dy, w, scale, scaling)` and `reduce(dh, x, n, dtype, bits, p)`, the same bits,
    with one second pass for both."""
    parts_b, db, ds = _parts_b(h, dy, w, scale, config)
    parts_a, da = _parts_a(dh, x, w.shape[0], dtype, bits, p, config, R=h.shape[1])
    finish(parts_b, w, scale, scaling, db, ds, parts_a, da)
    return db, ds, da
