"""shrink: H = x̂ Ãᵀ forward, dH = dy B̃ backward.

One program owns BLOCK_M tokens, as many of the R columns as its configuration holds (128 to 512) and a part of D, so x
is read once. Where that is not all of R, the programs of one tile of x are neighbours and the later ones find it in L2.
With few tokens D is split over programs and a second pass adds the parts in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles, split_k
from .dropout import keep_inverse, keep_tile, mask_arguments
from .launch import check_weight, check_written, launch, launch_options, output, rows, sum_dtype, tile_arguments
from .pack import Packing, pack_tile, prepare_weight
from .tiles import dot, store_columns, weight_tile


@triton.jit
def shrink_tile(
    x_ptrs, mask_m,  # [BLOCK_M, 1]
    out_ptr, stride_om, offs_m,  # H, and its rows [BLOCK_M]
    mask, mask_rows,  # as keep_tile takes them
    weight,  # as weight_tile takes it
    start_c, start_d, end_d, D,
    scaling: tl.constexpr, r: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_R2: tl.constexpr,
):  # fmt: skip
    """Columns of H from start_c on, for a tile of rows, summed over features from start_d to end_d."""
    offs_c = start_c + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    if BLOCK_R2 > 0:
        offs_c2 = start_c + BLOCK_R + tl.arange(0, BLOCK_R2)
        acc2 = tl.zeros((BLOCK_M, BLOCK_R2), ACC)
    for tile_d in range(start_d, end_d, BLOCK_D):
        offs_d = tile_d + tl.arange(0, BLOCK_D)
        inside = mask_m & (offs_d < D)[None, :]
        x = tl.load(x_ptrs + offs_d[None, :], mask=inside, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_D]
        if mask[0] is not None:
            keep = keep_tile(mask, mask_rows, tile_d, BLOCK_M, BLOCK_D)
            x = tl.where(keep, x, 0.0).to(DOT)
        w = weight_tile(weight, offs_c, offs_d, D, scaling, r, R, DOT, ACC)  # [BLOCK_R, BLOCK_D]
        acc = dot(x, tl.trans(w), acc)
        if BLOCK_R2 > 0:
            w2 = weight_tile(weight, offs_c2, offs_d, D, scaling, r, R, DOT, ACC)  # [BLOCK_R2, BLOCK_D]
            acc2 = dot(x, tl.trans(w2), acc2)
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_om  # here, for in the loop it would take registers
    inverse = keep_inverse(mask, ACC)
    store_columns(out_ptrs, mask_m, offs_c, acc * inverse, R)
    if BLOCK_R2 > 0:
        store_columns(out_ptrs, mask_m, offs_c2, acc2 * inverse, R)


@triton.jit(do_not_specialize=["M", "steps", "threshold", "tiles"])
def shrink_kernel(
    x_ptr, stride_xm,  # x [M, D]
    w_ptr, stride_wi, stride_wj, stride_wd,  # w [n, r, D]
    scale_ptr, stride_si, stride_sd,  # scale [n, D], or None
    out_ptr, stride_om,  # H [M, R], or its parts [parts, M, R]
    bits_ptr, stride_bits,  # mask [M, ⌈D/32⌉], or None
    threshold,  # 65536·p
    M,  # tokens
    D,  # features
    steps,  # tiles of features in a part
    tiles,  # programs that shrink; those after them pack
    pack_w_ptr, pack_stride_wi, pack_stride_wj, pack_stride_wd,  # w to pack [n, pack_r, pack_D], or None
    pack_scale_ptr, pack_stride_si, pack_stride_sd,  # its scale [n, pack_D], or None
    pack_out_ptr, pack_stride_or, pack_stride_od,  # what it is packed into [R, pack_D]
    pack_D,
    pack_scaling: tl.constexpr,
    pack_r: tl.constexpr,
    scaling: tl.constexpr,  # the constant factor c
    r: tl.constexpr,  # rank of a branch
    R: tl.constexpr,  # n·r
    DOT: tl.constexpr,  # dtype of the factors
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
):  # fmt: skip
    """H[m, i·r + j] = Σ_d x̂[m, d] · scaling · scale[i, d] · w[i, j, d]

    Bytes: x read once, H written once; w read ⌈M/BLOCK_M⌉ times, which L2 serves. A mask adds M·⌈D/32⌉·4.

    With pack_w_ptr the programs from `tiles` on pack another weight, so that what the joint product reads of B̃ costs no
    launch. Without pack_w_ptr, all arguments of packing are None.
    """
    pid, part = tl.program_id(0), tl.program_id(1)
    if pack_w_ptr is not None and pid >= tiles:
        pack_tile(
            (pack_w_ptr, pack_stride_wi, pack_stride_wj, pack_stride_wd,
             pack_scale_ptr, pack_stride_si, pack_stride_sd),
            pack_out_ptr, pack_stride_or, pack_stride_od, pid - tiles, pack_D, pack_scaling, pack_r, R, DOT, ACC,
        )  # fmt: skip
        return
    chunks: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    offs_m = (pid // chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_d = part * steps * BLOCK_D
    shrink_tile(
        x_ptr + offs_m[:, None] * stride_xm, (offs_m < M)[:, None],
        out_ptr + part.to(tl.int64) * M * stride_om, stride_om, offs_m,
        (bits_ptr, stride_bits, M, threshold), offs_m,
        (w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd),
        (pid % chunks) * (BLOCK_R + BLOCK_R2), start_d, min(start_d + steps * BLOCK_D, D), D,
        scaling, r, R, DOT, ACC, BLOCK_M, BLOCK_D, BLOCK_R, BLOCK_R2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size", "parts"])
def sum_parts_kernel(
    parts_ptr,  # [parts, M, R]
    out_ptr, stride_om,  # H [M, R]
    size,  # M·R
    parts,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[m, c] = Σ_s parts[s, m, c], in order.

    Bytes: the parts read once, out written once.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    ptrs = parts_ptr + offs
    acc = tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK]
    for _ in range(1, parts):
        ptrs += size
        acc += tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK]
    tl.store(out_ptr + offs // R * stride_om + offs % R, acc.to(out_ptr.dtype.element_ty), mask=mask)


NO_PACKING = dict.fromkeys(("tiles", *(name for name in shrink_kernel.arg_names if name.startswith("pack_"))))


def shrink(
    x: Tensor, w: Tensor, scale: Tensor | None = None, scaling: float = 1.0, bits: Tensor | None = None, p: float = 0.0,
    config: KernelConfig | None = None, packing: Packing | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """H (M, n·r) in x's dtype, from x (M, D), w (n, r, D) and scale None or (n, D) of any strides.

    `bits` is the dropout mask of x as `draw` gives it for p. Sums are float32, for float64 x float64. `packing` is done
    beside, in the same launch where D is not split. H is written to `out` where it is given, whose rows may be apart.
    Raises ValueError for shapes that do not agree or p outside [0, 1).
    """
    x = rows("x", x)
    M, D = x.shape
    check_weight(w, scale, D)
    mask = mask_arguments(bits, p, M, D)
    R = w.shape[0] * w.shape[1]
    out = output(out, (M, R), x.dtype, x)
    check_written("out", out)
    if out.numel() == 0 or out.is_meta:
        return out
    arch, processors = device_of(x)
    config = config or pick("shrink", M, R, x.dtype, arch, dropout=bits is not None)
    weight = prepare_weight(w, scale, scaling, x.dtype, config.pack)
    blocks = rank_tiles(R, config)
    tiles = cdiv(M, config.BLOCK_M) * cdiv(R, sum(blocks))
    parts, steps = split_k(tiles, cdiv(D, config.BLOCK_D), processors * config.programs, config.min_steps)
    target = out if parts == 1 else torch.empty((parts, M, R), dtype=sum_dtype(x.dtype), device=x.device)
    programs, packed = tiles, NO_PACKING
    if packing is not None and parts == 1:
        programs += packing.programs()
        packed = {"tiles": tiles, **{f"pack_{name}": value for name, value in packing.arguments().items()}}
    elif packing is not None:
        packing.launch()
    launch(
        x, shrink_kernel, (programs, parts), x_ptr=x, stride_xm=x.stride(0), **weight, **mask, M=M, D=D, steps=steps,
        out_ptr=target, stride_om=out.stride(0) if parts == 1 else R, **packed,
        **tile_arguments(x.dtype, config, blocks),
    )  # fmt: skip
    if parts > 1:
        launch(
            x, sum_parts_kernel, (cdiv(M * R, 1024), 1),
            parts_ptr=target, out_ptr=out, stride_om=out.stride(0), size=M * R, parts=parts, R=R, BLOCK=1024,
            **launch_options(),
        )  # fmt: skip
    return out
