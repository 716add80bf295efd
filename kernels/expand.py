"""expand: y = H B̃ᵀ (+ b) or y += H B̃ᵀ forward, dx = or += mask/(1−p) ⊙ (dH Ã) backward.

A program keeps the (R, BLOCK_D) tile of the scaled weight, which it reads and scales once, and walks over the tokens in
tiles of BLOCK_M. A rank larger than its configuration holds runs in slices, which are read again on every tile.
Where the whole tile is too large to be scaled in registers, pack scales the weight before.

The kept weight carries a minus sign and the sum is subtracted: y − (+0) is y to the bit, where y + (+0) turns −0 into
+0, and 0 − (±0) is +0. So where the branches give nothing y keeps its bits, or is +0, or is the bias.
"""

import triton
import triton.language as tl
from torch import Tensor

from .configs import KernelConfig, cdiv, device_of, pick, slice_tiles
from .dropout import drop_sum, mask_arguments
from .launch import check_weight, check_written, launch, rows, tile_arguments
from .pack import prepare_weight
from .tiles import dot, head_tile, weight_tile


@triton.jit
def add_slices(
    acc, h_ptrs, mask_m, weight, offs_d, D,
    scaling: tl.constexpr, r: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_D] + h · scaling·scale⊙w, slice by slice of the rank; h_ptrs and mask_m are [BLOCK_M, 1]."""
    for start_c in range(0, R, BLOCK_R):
        offs_c = start_c + tl.arange(0, BLOCK_R)
        h = head_tile(h_ptrs, mask_m, offs_c, R, DOT)  # [BLOCK_M, BLOCK_R]
        w = weight_tile(weight, offs_c, offs_d, D, scaling, r, R, DOT, acc.dtype)  # [BLOCK_R, BLOCK_D]
        acc = dot(h, w, acc)
    return acc


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def expand_kernel(
    y_ptr, stride_ym,  # y [M, D]
    h_ptr, stride_hm,  # H [M, R]
    w_ptr, stride_wi, stride_wj, stride_wd,  # w [n, r, D]
    scale_ptr, stride_si, stride_sd,  # scale [n, D], or None
    bias_ptr,  # bias [D] that y is written onto, or None
    bits_ptr, stride_bits,  # mask [M, ⌈D/32⌉], or None
    threshold,  # 65536·p
    M,  # tokens
    D,  # features
    steps,  # tiles of tokens a program walks over
    scaling: tl.constexpr,  # the constant factor −c
    r: tl.constexpr,  # rank of a branch
    R: tl.constexpr,  # n·r
    ACCUMULATE: tl.constexpr,  # whether y is added to, or written
    DOT: tl.constexpr,  # dtype of the factors
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
):  # fmt: skip
    """y[m, d] = (y or bias)[m, d] − keep[m, d]/(1−p) · Σ_i Σ_j h[m, i·r + j] · scaling · scale[i, d] · w[i, j, d]

    Bytes: y written once, and read once when it is added to; h read ⌈D/BLOCK_D⌉ times, which L2 serves; w read once by
    each of the programs that share a tile of features. A mask adds M·⌈D/32⌉·4.
    """
    weight = (w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd)
    mask = (bits_ptr, stride_bits, M, threshold)
    slices: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    start_d = tl.program_id(0) * BLOCK_D
    offs_d = start_d + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    offs_c = tl.arange(0, BLOCK_R)
    if slices == 1:
        w = weight_tile(weight, offs_c, offs_d, D, scaling, r, R, DOT, ACC)  # [BLOCK_R, BLOCK_D]
    if BLOCK_R2 > 0:
        offs_c2 = BLOCK_R + tl.arange(0, BLOCK_R2)
        w2 = weight_tile(weight, offs_c2, offs_d, D, scaling, r, R, DOT, ACC)  # [BLOCK_R2, BLOCK_D]
    base = tl.zeros((1, BLOCK_D), ACC)
    if bias_ptr is not None:
        base = tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0).to(ACC)[None, :]  # [1, BLOCK_D]
    offs_t = tl.arange(0, BLOCK_M)
    y_offs = offs_t.to(tl.int64)[:, None] * stride_ym + offs_d[None, :]
    h_offs = offs_t.to(tl.int64)[:, None] * stride_hm
    for step in range(steps):
        # Programs of one step are neighbours: they read the same rows of h.
        start_m = (step * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * BLOCK_M
        mask_m = (offs_t < tl.minimum(M - start_m, BLOCK_M).to(tl.int32))[:, None]
        h_ptrs = h_ptr + start_m * stride_hm + h_offs
        acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        if slices == 1:
            acc = dot(head_tile(h_ptrs, mask_m, offs_c, R, DOT), w, acc)  # [BLOCK_M, BLOCK_R]
            if BLOCK_R2 > 0:
                acc = dot(head_tile(h_ptrs, mask_m, offs_c2, R, DOT), w2, acc)  # [BLOCK_M, BLOCK_R2]
        else:
            acc = add_slices(acc, h_ptrs, mask_m, weight, offs_d, D, scaling, r, R, DOT, BLOCK_R)
        acc = drop_sum(acc, mask, start_m + offs_t, start_d, BLOCK_M, BLOCK_D)
        y_ptrs = y_ptr + start_m * stride_ym + y_offs
        if ACCUMULATE:
            acc = tl.load(y_ptrs, mask=mask_m & mask_d, other=0.0).to(ACC) - acc  # [BLOCK_M, BLOCK_D]
        else:
            acc = base - acc
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_d)


def expand(
    y: Tensor, h: Tensor, w: Tensor, scale: Tensor | None = None, scaling: float = 1.0, bits: Tensor | None = None,
    p: float = 0.0, accumulate: bool = True, bias: Tensor | None = None, config: KernelConfig | None = None,
) -> None:  # fmt: skip
    """Adds the branches to y (M, D) in place, from h (M, n·r), w (n, r, D) and scale None or (n, D) of any strides.

    `bits` is the dropout mask of an (M, D) input as `draw` gives it for p, and multiplies what is added. Where that is
    zero the bits of y do not change. With `accumulate=False` y, which may be uninitialized, is overwritten with the
    branches plus `bias` (D,), if given; where the branches give zero, y is +0 or the bias. y needs a contiguous last
    dimension. Raises ValueError for shapes or strides that do not fit, p outside [0, 1), or a bias that nothing is
    written onto.
    """
    check_written("y", y)
    h = rows("h", h)
    M, D = y.shape
    check_weight(w, scale, D)
    mask = mask_arguments(bits, p, M, D)
    R = w.shape[0] * w.shape[1]
    if h.shape != (M, R):
        raise ValueError(f"h has shape {tuple(h.shape)}, wanted {(M, R)}.")
    if bias is not None and (accumulate or bias.shape != (D,)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, wanted {(D,)}, and accumulate=False.")
    if y.numel() == 0 or y.is_meta:
        return
    arch, processors = device_of(y)
    config = config or pick("expand", M, R, h.dtype, arch, accumulate, bits is not None)
    tiles_d, tiles_m = cdiv(D, config.BLOCK_D), cdiv(M, config.BLOCK_M)
    steps = cdiv(tiles_m, max(1, processors * config.programs // tiles_d))
    launch(
        y, expand_kernel, (tiles_d, cdiv(tiles_m, steps)),
        y_ptr=y, stride_ym=y.stride(0), h_ptr=h, stride_hm=h.stride(0),
        **prepare_weight(w, scale, -scaling, h.dtype, config.pack), **mask, M=M, D=D, steps=steps,
        bias_ptr=None if bias is None else bias.contiguous(), ACCUMULATE=accumulate,
        **tile_arguments(h.dtype, config, slice_tiles(R, config, h.element_size())),
    )  # fmt: skip
