"""shrink: H = x̂ Ãᵀ forward, dH = dy B̃ backward.

    H[m, i·r + j] = Σ_d x̂[m, d] · scaling · scale[i, d] · w[i, j, d]

One program owns BLOCK_M tokens, as many of the R columns as its configuration holds (128 to 512) and a part of D, so x
is read once. Where that is not all of R, the programs of one tile of x are neighbours and the later ones find it in L2.
With few tokens D is split over programs and a second pass adds the parts in order.

Bytes: x read once, H written; w read ⌈M/BLOCK_M⌉ times, which L2 serves. Of a mask M·⌈D/32⌉·4 more.
"""

import torch
import triton
import triton.language as tl

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles, split_k
from .dropout import check_bits, drop_threshold, keep_inverse, keep_tile
from .launch import TL_DTYPES, check_weight, dot_dtype, launch, launch_options, rows, small_options, strides, sum_dtype
from .pack import NO_PACKING, Packing, pack, pack_kernel, weight_tile


@triton.jit(do_not_specialize=["M", "steps", "threshold", "tiles"])
def shrink_kernel(
    x_ptr,  # (M, D)
    w_ptr,  # (n, r, D), any strides
    scale_ptr,  # (n, D), any strides, or None
    out_ptr,  # (parts, M, R), or (M, R) with rows stride_om apart where there is one part
    bits_ptr,  # (M, ⌈D/32⌉) or None
    b_ptr,  # (n, r, N), any strides, or None
    b_scale_ptr,  # (n, N), any strides, or None
    packed_ptr,  # (R, N), any strides
    M,
    D,
    steps,  # tiles of features in a part
    threshold,
    stride_xm,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_si,
    stride_sd,
    stride_bits,
    stride_om,
    tiles,  # programs that shrink; those after them pack
    N,
    stride_bi,
    stride_bj,
    stride_bn,
    stride_ci,
    stride_cn,
    stride_pr,
    stride_pn,
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
    b_scaling: tl.constexpr,
    b_r: tl.constexpr,
    B_SCALE: tl.constexpr,
    PACK_R: tl.constexpr,
    PACK_N: tl.constexpr,
):
    """With b_ptr the programs from `tiles` on pack: what the joint product reads of B̃ costs no launch. Without, nothing
    that packing takes is given."""
    pid, part = tl.program_id(0), tl.program_id(1)
    if b_ptr is not None and pid >= tiles:
        pack_kernel(
            b_ptr, b_scale_ptr, packed_ptr, tiles, N, stride_bi, stride_bj, stride_bn, stride_ci, stride_cn,
            stride_pr, stride_pn, b_scaling, b_r, R, B_SCALE, DOT, ACC, PACK_R, PACK_N,
        )  # fmt: skip
        return
    chunks: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    offs_m = (pid // chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_c = (pid % chunks) * (BLOCK_R + BLOCK_R2)
    offs_c = start_c + tl.arange(0, BLOCK_R)
    mask_m = (offs_m < M)[:, None]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    if BLOCK_R2 > 0:
        offs_c2 = start_c + BLOCK_R + tl.arange(0, BLOCK_R2)
        acc2 = tl.zeros((BLOCK_M, BLOCK_R2), ACC)
    first = part * steps * BLOCK_D
    for start_d in range(first, min(first + steps * BLOCK_D, D), BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptrs + offs_d[None, :], mask=mask_m & (offs_d < D)[None, :], other=0.0).to(DOT)
        if DROPOUT:
            keep = keep_tile(bits_ptr, offs_m, start_d, M, stride_bits, BLOCK_M, BLOCK_D)
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
    if DROPOUT:
        acc *= keep_inverse(threshold, ACC)
    out_ptrs = out_ptr + (part.to(tl.int64) * M + offs_m)[:, None] * stride_om
    tl.store(out_ptrs + offs_c[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask_m & (offs_c < R)[None, :])
    if BLOCK_R2 > 0:
        if DROPOUT:
            acc2 *= keep_inverse(threshold, ACC)
        tl.store(out_ptrs + offs_c2[None, :], acc2.to(out_ptr.dtype.element_ty), mask=mask_m & (offs_c2 < R)[None, :])


@triton.jit(do_not_specialize=["size", "parts"])
def sum_parts_kernel(parts_ptr, out_ptr, size, parts, stride_om, R: tl.constexpr, BLOCK: tl.constexpr):
    """out[m, c] = Σ_s parts[s, m, c], in order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    ptrs = parts_ptr + offs
    acc = tl.load(ptrs, mask=mask, other=0.0)
    for _ in range(1, parts):
        ptrs += size
        acc += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(out_ptr + offs // R * stride_om + offs % R, acc.to(out_ptr.dtype.element_ty), mask=mask)


def shrink(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None = None,
    scaling: float = 1.0,
    bits: torch.Tensor | None = None,
    p: float = 0.0,
    config: KernelConfig | None = None,
    packing: Packing | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """H (M, n·r) in x's dtype, from x (M, D), w (n, r, D) and scale None or (n, D) of any strides.

    `bits` is the dropout mask of x as `draw` gives it for p. Sums are float32, for float64 x float64. `packing` is done
    beside, in the same launch where D is not split. H is written to `out` where it is given, whose rows may be apart.
    Raises ValueError for shapes that do not agree or p outside [0, 1).
    """
    x = rows("x", x)
    M, D = x.shape
    check_weight(w, scale, D)
    dropout, threshold = check_bits(bits, M, D), drop_threshold(p)
    n, r, _ = w.shape
    R = n * r
    if out is None:
        out = torch.empty((M, R), dtype=x.dtype, device=x.device)
    elif out.shape != (M, R) or out.dtype != x.dtype or (out.stride(1) != 1 and R > 1):
        raise ValueError(
            f"out has shape {tuple(out.shape)}, strides {out.stride()} and dtype {out.dtype}, wanted {(M, R)} of "
            f"{x.dtype} with a contiguous last dimension."
        )
    if out.numel() == 0 or out.is_meta:
        return out
    arch, processors = device_of(x)
    config = config or pick("shrink", M, R, x.dtype, arch, dropout=dropout)
    if config.pack and (scale is not None or scaling != 1.0 or w.dtype != x.dtype or w.stride(2) != 1):
        w, scale, scaling = pack(w, x.dtype, scale, scaling)[None], None, 1.0
    if scale is None and w.stride(0) == w.shape[1] * w.stride(1):
        w = w.reshape(1, R, D)
    stride_wi, stride_wj, stride_wd = w.stride()
    stride_si, stride_sd = strides(scale, 2)
    block_r, block_r2 = rank_tiles(R, config)
    tiles = cdiv(M, config.BLOCK_M) * cdiv(R, block_r + block_r2)
    parts, steps = split_k(tiles, cdiv(D, config.BLOCK_D), processors * config.programs, config.min_steps)
    sums = sum_dtype(x.dtype)
    target = out if parts == 1 else torch.empty((parts, M, R), dtype=sums, device=x.device)
    arguments = {
        "x_ptr": x, "w_ptr": w, "scale_ptr": scale, "out_ptr": target, "bits_ptr": bits,
        "M": M, "D": D, "steps": steps, "threshold": threshold, "stride_xm": x.stride(0),
        "stride_wi": stride_wi, "stride_wj": stride_wj, "stride_wd": stride_wd,
        "stride_si": stride_si, "stride_sd": stride_sd,
        "stride_bits": 0 if bits is None else bits.shape[1], "stride_om": out.stride(0) if parts == 1 else R,
        "scaling": float(scaling), "r": w.shape[1], "R": R,
        "HAS_SCALE": scale is not None, "DROPOUT": dropout, "DOT": dot_dtype(x.dtype), "ACC": TL_DTYPES[sums],
        "BLOCK_M": config.BLOCK_M, "BLOCK_D": config.BLOCK_D, "BLOCK_R": block_r, "BLOCK_R2": block_r2,
        **launch_options(config),
    }  # fmt: skip
    if packing is not None and parts == 1:
        launch(x, shrink_kernel, (tiles + packing.programs(), 1), **arguments, **packing.arguments(tiles))
    else:
        launch(x, shrink_kernel, (tiles, parts), **arguments, **NO_PACKING)
        if packing is not None:
            packing.launch()
    if parts > 1:
        launch(
            x, sum_parts_kernel, (cdiv(M * R, 1024), 1),
            parts_ptr=target, out_ptr=out, size=M * R, parts=parts, stride_om=out.stride(0), R=R, BLOCK=1024,
            **small_options(),
        )  # fmt: skip
    return out
