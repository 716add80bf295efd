"""expand: y = H B̃ᵀ (+ b) or y += H B̃ᵀ forward, dx = or += mask/(1−p) ⊙ (dH Ã) backward.

    y[m, d] (+)= keep[m, d]/(1−p) · Σ_i Σ_j h[m, i·r + j] · scaling · scale[i, d] · w[i, j, d]

A program keeps the (R, BLOCK_D) tile of the scaled weight, which it reads and scales once, and walks over the tokens in
tiles of BLOCK_M. A rank larger than its configuration holds runs in slices, which are read again on every tile.
Where the whole tile is too large to be scaled in registers, pack scales the weight before.

Bytes: y written once, and read once when it is added to; h read ⌈D/BLOCK_D⌉ times, which L2 serves; w read once by each
of the programs that share a tile of features. Of a mask M·⌈D/32⌉·4 more.

The kept weight carries a minus sign and the sum is subtracted: y − (+0) is y to the bit, where y + (+0) turns −0 into
+0, and 0 − (±0) is +0. So where the branches give nothing y keeps its bits, or is +0, or is the bias.
"""

import torch
import triton
import triton.language as tl

from .configs import KernelConfig, cdiv, device_of, pick, slice_tiles
from .dropout import check_bits, drop_threshold, keep_inverse, keep_tile
from .launch import (
    TL_DTYPES,
    check_weight,
    check_written,
    dot_dtype,
    launch,
    launch_options,
    rows,
    strides,
    sum_dtype,
)
from .pack import pack, weight_tile


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def expand_kernel(
    y_ptr,  # (M, D)
    h_ptr,  # (M, R)
    w_ptr,  # (n, r, D), any strides
    scale_ptr,  # (n, D), any strides, or None
    bias_ptr,  # (D,) or None, where y is written
    bits_ptr,  # (M, ⌈D/32⌉) or None
    M,
    D,
    steps,  # tiles of tokens a program walks over
    threshold,
    stride_ym,
    stride_hm,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_si,
    stride_sd,
    stride_bits,
    scaling: tl.constexpr,  # with the minus sign
    r: tl.constexpr,
    R: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
):
    slices: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    start_d = tl.program_id(0) * BLOCK_D
    offs_d = start_d + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    offs_c = tl.arange(0, BLOCK_R)
    if slices == 1:
        w = weight_tile(
            w_ptr, scale_ptr, offs_c, offs_d, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
            scaling, r, R, HAS_SCALE, DOT, ACC,
        )  # fmt: skip  # [BLOCK_R, BLOCK_D]
    if BLOCK_R2 > 0:
        offs_c2 = BLOCK_R + tl.arange(0, BLOCK_R2)
        w2 = weight_tile(
            w_ptr, scale_ptr, offs_c2, offs_d, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
            scaling, r, R, HAS_SCALE, DOT, ACC,
        )  # fmt: skip  # [BLOCK_R2, BLOCK_D]
    base = tl.zeros((1, BLOCK_D), ACC)
    if HAS_BIAS:
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
            h = tl.load(h_ptrs + offs_c[None, :], mask=mask_m & (offs_c < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
            acc = tl.dot(h.to(DOT), w, acc, input_precision="ieee", out_dtype=ACC)
            if BLOCK_R2 > 0:
                h2 = tl.load(h_ptrs + offs_c2[None, :], mask=mask_m & (offs_c2 < R)[None, :], other=0.0)
                acc = tl.dot(h2.to(DOT), w2, acc, input_precision="ieee", out_dtype=ACC)
        else:
            for start_c in range(0, R, BLOCK_R):
                offs_s = start_c + offs_c
                h = tl.load(h_ptrs + offs_s[None, :], mask=mask_m & (offs_s < R)[None, :], other=0.0)
                v = weight_tile(
                    w_ptr, scale_ptr, offs_s, offs_d, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
                    scaling, r, R, HAS_SCALE, DOT, ACC,
                )  # fmt: skip  # [BLOCK_R, BLOCK_D]
                acc = tl.dot(h.to(DOT), v, acc, input_precision="ieee", out_dtype=ACC)
        if DROPOUT:
            keep = keep_tile(bits_ptr, start_m + offs_t, start_d, M, stride_bits, BLOCK_M, BLOCK_D)
            acc = tl.where(keep, acc * keep_inverse(threshold, ACC), 0.0)
        y_ptrs = y_ptr + start_m * stride_ym + y_offs
        if ACCUMULATE:
            acc = tl.load(y_ptrs, mask=mask_m & mask_d, other=0.0).to(ACC) - acc  # [BLOCK_M, BLOCK_D]
        else:
            acc = base - acc
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_d)


def expand(
    y: torch.Tensor,
    h: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor | None = None,
    scaling: float = 1.0,
    bits: torch.Tensor | None = None,
    p: float = 0.0,
    accumulate: bool = True,
    bias: torch.Tensor | None = None,
    config: KernelConfig | None = None,
) -> None:
    """Adds the branches to y (M, D) in place, from h (M, n·r), w (n, r, D) and scale None or (n, D) of any strides.

    `bits` is the dropout mask of an (M, D) input as `draw` gives it for p, and multiplies what is added. Where that is
    zero the bits of y do not change. With `accumulate=False` it is written instead, onto `bias` (D,) where there is
    one: what y holds, which may be nothing yet, is neither read nor kept, and where the branches give zero y is +0 or
    the bias. y needs a contiguous last dimension. Raises ValueError for shapes or strides that do not fit, p outside
    [0, 1), or a bias that nothing is written onto.
    """
    check_written("y", y)
    h = rows("h", h)
    M, D = y.shape
    check_weight(w, scale, D)
    dropout, threshold = check_bits(bits, M, D), drop_threshold(p)
    n, r, _ = w.shape
    R = n * r
    if h.shape != (M, R):
        raise ValueError(f"h has shape {tuple(h.shape)}, wanted {(M, R)}.")
    if bias is not None and (accumulate or bias.shape != (D,)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, wanted {(D,)}, and accumulate=False.")
    if y.numel() == 0 or y.is_meta:
        return
    arch, processors = device_of(y)
    config = config or pick("expand", M, R, h.dtype, arch, accumulate, dropout)
    scaling = -float(scaling)
    if config.pack and (scale is not None or scaling != -1.0 or w.dtype != h.dtype or w.stride(2) != 1):
        w, scale, scaling = pack(w, h.dtype, scale, scaling)[None], None, 1.0
    if scale is None and w.stride(0) == w.shape[1] * w.stride(1):
        w = w.reshape(1, R, D)
    stride_wi, stride_wj, stride_wd = w.stride()
    stride_si, stride_sd = strides(scale, 2)
    block_r, block_r2 = slice_tiles(R, config, h.element_size())
    tiles_d, tiles_m = cdiv(D, config.BLOCK_D), cdiv(M, config.BLOCK_M)
    steps = cdiv(tiles_m, max(1, processors * config.programs // tiles_d))
    launch(
        y, expand_kernel, (tiles_d, cdiv(tiles_m, steps)),
        y_ptr=y, h_ptr=h, w_ptr=w, scale_ptr=scale, bias_ptr=None if bias is None else bias.contiguous(), bits_ptr=bits,
        M=M, D=D, steps=steps, threshold=threshold, stride_ym=y.stride(0), stride_hm=h.stride(0),
        stride_wi=stride_wi, stride_wj=stride_wj, stride_wd=stride_wd, stride_si=stride_si, stride_sd=stride_sd,
        stride_bits=0 if bits is None else bits.shape[1], scaling=scaling, r=w.shape[1], R=R,
        HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, DROPOUT=dropout, ACCUMULATE=accumulate,
        DOT=dot_dtype(h.dtype), ACC=TL_DTYPES[sum_dtype(h.dtype)],
        BLOCK_M=config.BLOCK_M, BLOCK_D=config.BLOCK_D, BLOCK_R=block_r, BLOCK_R2=block_r2, **launch_options(config),
    )  # fmt: skip
