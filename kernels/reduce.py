"""reduce over tokens: dÃ = dHᵀ x̂, and P = dyᵀ H with dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ) as its epilogue.

The first kernel sums a part of the tokens for BLOCK_D features and as many of the R columns as its configuration holds
(256 or 512), so z, which is x or dy, is read once; where that is not all of R, the programs of one tile of z are
neighbours and the later ones find it in L2. It accumulates (D, R), which stays on the tensor cores however few columns
there are. The second, in finish.py, adds the parts in order. Each runs once for both gradients of a layer: one launch
with twice the tiles fills the GPU with half the parts.
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


@triton.jit
def reduce_tile(
    z_ptr, stride_zm, h_ptr, stride_hm, parts_ptr, mask, pid, part, M, D, steps,
    R: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_R2: tl.constexpr,
):  # fmt: skip
    """BLOCK_D features of ẑᵀ h, and one chunk of its columns, over the tokens of a part."""
    chunks: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
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


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def reduce_kernel(
    dy_ptr, stride_ym,  # dy [M, N], or None where lora_B wants no gradient
    h_ptr, stride_hm,  # H [M, R]
    parts_b_ptr,  # P in parts [parts, N, R]
    x_ptr, stride_xm,  # x [M, K], or None where lora_A wants no gradient
    dh_ptr, stride_dm,  # dH [M, R]
    parts_a_ptr,  # dÃᵀ in parts [parts, K, R]
    bits_ptr, stride_bits,  # mask of x [M, ⌈K/32⌉], or None
    threshold,  # 65536·p
    M,  # tokens
    N,  # out_features
    K,  # in_features
    steps,  # tiles of tokens in a part
    R: tl.constexpr,  # n·r
    DOT: tl.constexpr,  # dtype of the factors
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
):  # fmt: skip
    """P[d, c] = Σ_m dy[m, d] · h[m, c],  dÃᵀ[d, c] = Σ_m x̂[m, d] · dh[m, c], in parts of the tokens

    The first ⌈N/BLOCK_D⌉·chunks programs of a part give P, the others dÃᵀ.

    Bytes: dy and x read once, h ⌈N/BLOCK_D⌉ and dh ⌈K/BLOCK_D⌉ times, which L2 serves; the parts, (N + K)·R·4 each,
    written. A mask adds M·⌈K/32⌉·4.
    """
    pid, part, first_a = tl.program_id(0), tl.program_id(1), 0
    if dy_ptr is not None:
        first_a = tl.cdiv(N, BLOCK_D) * tl.cdiv(R, BLOCK_R + BLOCK_R2)
        if pid < first_a:
            reduce_tile(
                dy_ptr, stride_ym, h_ptr, stride_hm, parts_b_ptr, (None, 0, M, 0), pid, part, M, N, steps,
                R, DOT, ACC, BLOCK_M, BLOCK_D, BLOCK_R, BLOCK_R2,
            )  # fmt: skip
    if x_ptr is not None:  # noqa: SIM102 (a constant, which leaves the rest out)
        if pid >= first_a:
            mask = (bits_ptr, stride_bits, M, threshold)
            reduce_tile(
                x_ptr, stride_xm, dh_ptr, stride_dm, parts_a_ptr, mask, pid - first_a, part, M, K, steps,
                R, DOT, ACC, BLOCK_M, BLOCK_D, BLOCK_R, BLOCK_R2,
            )  # fmt: skip


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


def _sum_tokens(h, dy, dh, x, bits, p, config) -> tuple[Tensor | None, Tensor | None]:
    """The parts (S, N, R) of dyᵀ h and (S, K, R) of x̂ᵀ dh in the accumulator's dtype, by one launch. A pair may be
    None; None for what is not given or has nothing to run."""
    mask = mask_arguments(bits, p, *(dy if x is None else x).shape)
    (h, dy), (dh, x) = _runs(h, dy), _runs(dh, x)
    z, head = (x, dh) if dy is None else (dy, h)
    if z is None:
        return None, None
    (M, R), N, K = head.shape, 0 if dy is None else dy.shape[1], 0 if x is None else x.shape[1]
    arch, processors = device_of(z)
    config = config or pick("reduce", M, R, z.dtype, arch, dropout=bits is not None)
    blocks = rank_tiles(R, config)
    tiles = (cdiv(N, config.BLOCK_D) + cdiv(K, config.BLOCK_D)) * cdiv(R, sum(blocks))
    parts, steps = split_k(tiles, cdiv(M, config.BLOCK_M), processors * config.programs, config.min_steps)
    parts_b, parts_a = [
        torch.empty((parts, D, R), dtype=sum_dtype(z.dtype), device=z.device) if D > 0 else None for D in (N, K)
    ]
    launch(
        z, reduce_kernel, (tiles, parts),
        dy_ptr=dy, stride_ym=_pitch(dy), h_ptr=h, stride_hm=_pitch(h), parts_b_ptr=parts_b,
        x_ptr=x, stride_xm=_pitch(x), dh_ptr=dh, stride_dm=_pitch(dh), parts_a_ptr=parts_a,
        **mask, M=M, N=N, K=K, steps=steps, R=R, **tile_arguments(z.dtype, config, blocks),
    )  # fmt: skip
    return parts_b, parts_a


def _runs(h, z) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if z is None or z.shape[1] == 0 or z.is_meta else (h, z)


def _pitch(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _pair_a(h, x, n, dtype, R=None):
    """h and x, checked, and where dA goes."""
    h, x = check_pair(h, x, "x", R, n=n)
    return h, x, torch.empty((n, h.shape[1] // n, x.shape[1]), dtype=dtype, device=x.device)


def _pair_b(h, dy, w, scale):
    """h and dy, checked, and where dB and ds go."""
    check_weight(w, scale, dy.shape[1])
    n, r, N = w.shape
    h, dy = check_pair(h, dy, "dy", n * r)
    db = torch.empty((n, N, r), dtype=w.dtype, device=dy.device)
    return h, dy, db, torch.empty((n, N), dtype=sum_dtype(dy.dtype), device=dy.device)


def reduce(
    h: Tensor, x: Tensor, n: int, dtype: torch.dtype, bits: Tensor | None = None, p: float = 0.0,
    config: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """dA = hᵀ x̂ as (n, r, D) in `dtype`, from h (M, n·r) and x (M, D); x̂ is x after the dropout of `bits` and p.

    Raises ValueError for shapes or dtypes that do not agree or p outside [0, 1).
    """
    h, x, da = _pair_a(h, x, n, dtype)
    finish(parts_a=_sum_tokens(None, None, h, x, bits, p, config)[1], da=da)
    return da


def reduce_scaled(
    h: Tensor, dy: Tensor, w: Tensor, scale: Tensor | None, scaling: float = 1.0, config: KernelConfig | None = None
) -> tuple[Tensor, Tensor]:
    """(dB, ds) from h (M, n·r), dy (M, N), w (n, r, N), being lora_B transposed, and scale None (all ones) or (n, N).

    dB is (n, N, r) in w's dtype. ds is (n, N) in float32 (float64 for float64 dy), for a scalar scale still to be
    summed over N. Raises ValueError for shapes or dtypes that do not agree.
    """
    h, dy, db, ds = _pair_b(h, dy, w, scale)
    finish(_sum_tokens(h, dy, None, None, None, 0.0, config)[0], w, scale, scaling, db, ds)
    return db, ds


def reduce_all(
    h: Tensor, dy: Tensor, w: Tensor, scale: Tensor | None, scaling: float, dh: Tensor, x: Tensor, dtype: torch.dtype,
    bits: Tensor | None = None, p: float = 0.0, config: KernelConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dB, ds, dA) of `reduce_scaled(h, dy, w, scale, scaling)` and `reduce(dh, x, n, dtype, bits, p)`, by one launch
    of each kernel for both. The sums are split otherwise, so the last bits differ where they are split."""
    h, dy, db, ds = _pair_b(h, dy, w, scale)
    dh, x, da = _pair_a(dh, x, w.shape[0], dtype, h.shape[1])
    if x.shape[0] != dy.shape[0] or x.dtype != dy.dtype:
        raise ValueError(f"x has {x.shape[0]} rows of {x.dtype}, wanted {dy.shape[0]} of {dy.dtype} as dy has.")
    parts_b, parts_a = _sum_tokens(h, dy, dh, x, bits, p, config)
    finish(parts_b, w, scale, scaling, db, ds, parts_a, da)
    return db, ds, da
