"""expand by experts: y += H B̃_eᵀ forward, dx += mask/(1−p) ⊙ (dH Ã_e) backward, for S rows sorted by expert.

A program keeps a tile of one expert's rows of h and walks over the features in tiles of BLOCK_D. A rank larger than its
configuration holds runs in slices, of which h is read again on every tile. Rows of no expert keep their bits, and so
does y where nothing is added: the weight carries a minus sign and the sum is subtracted, as in expand.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import KernelConfig, cdiv, device_of, pick, slice_tiles
from .dropout import drop_sum
from .expand import add_slices
from .grouped import check_vector, find_rows, find_tile, grouped_mask, most_tiles
from .launch import check_weight, check_written, launch, rows, tile_arguments
from .pack import prepare_weight
from .tiles import dot, head_tile, weight_tile


@triton.jit(do_not_specialize=["S", "E", "steps", "parts", "mask_rows", "threshold"])
def grouped_expand_kernel(
    y_ptr, stride_ym,  # y [S, D]
    h_ptr, stride_hm,  # H [S, R]
    w_ptr, stride_we, stride_wi, stride_wj, stride_wd,  # w [E, n, r, D]
    scale_ptr, stride_se, stride_si, stride_sd,  # scale [E, n, D], or None
    offs_ptr,  # ends of the experts' rows [E]
    ids_ptr,  # rows of the mask [S], or None where they are 0 to S
    bits_ptr, stride_bits,  # mask [mask_rows, ⌈D/32⌉], or None
    mask_rows,
    threshold,  # 65536·p
    S,  # rows
    E,  # experts
    D,  # features
    steps,  # tiles of features a program walks over
    parts,  # programs of one tile of rows
    scaling: tl.constexpr,  # the constant factor −c
    r: tl.constexpr,  # rank of a branch
    R: tl.constexpr,  # n·r
    DOT: tl.constexpr,  # dtype of the factors
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,  # a second tile of the rank, or 0
    BLOCK_E: tl.constexpr,  # more than E
):  # fmt: skip
    """y[s, d] −= keep[s, d]/(1−p) · Σ_i Σ_j h[s, i·r + j] · scaling · scale[e, i, d] · w[e, i, j, d]

    Bytes: y read and written once; h read once by each program of its rows; w and scale of an expert read once by each
    of its tiles of rows, which L2 serves. A mask adds S·⌈D/32⌉·4.
    """
    slices: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    pid = tl.program_id(0)
    e, offs_m, rows_m = find_tile(offs_ptr, pid // parts, S, E, BLOCK_M, BLOCK_E)
    w_ptr += e.to(tl.int64) * stride_we
    if scale_ptr is not None:
        scale_ptr += e.to(tl.int64) * stride_se
    weight = (w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd)
    mask, mask_rows = (bits_ptr, stride_bits, mask_rows, threshold), find_rows(ids_ptr, offs_m, rows_m)
    mask_m = rows_m[:, None]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
    offs_c = tl.arange(0, BLOCK_R)
    if slices == 1:
        h = head_tile(h_ptrs, mask_m, offs_c, R, DOT)  # [BLOCK_M, BLOCK_R]
    if BLOCK_R2 > 0:
        offs_c2 = BLOCK_R + tl.arange(0, BLOCK_R2)
        h2 = head_tile(h_ptrs, mask_m, offs_c2, R, DOT)  # [BLOCK_M, BLOCK_R2]
    start = (pid % parts) * steps * BLOCK_D
    for start_d in range(start, tl.where(e < E, min(start + steps * BLOCK_D, D), 0), BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        if slices == 1:
            w = weight_tile(weight, offs_c, offs_d, D, scaling, r, R, DOT, ACC)  # [BLOCK_R, BLOCK_D]
            acc = dot(h, w, acc)
            if BLOCK_R2 > 0:
                w2 = weight_tile(weight, offs_c2, offs_d, D, scaling, r, R, DOT, ACC)  # [BLOCK_R2, BLOCK_D]
                acc = dot(h2, w2, acc)
        else:
            acc = add_slices(acc, h_ptrs, mask_m, weight, offs_d, D, scaling, r, R, DOT, BLOCK_R)
        acc = drop_sum(acc, mask, mask_rows, start_d, BLOCK_M, BLOCK_D)
        inside = mask_m & (offs_d < D)[None, :]
        acc = tl.load(y_ptrs + offs_d[None, :], mask=inside, other=0.0).to(ACC) - acc  # [BLOCK_M, BLOCK_D]
        tl.store(y_ptrs + offs_d[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


def grouped_expand(
    y: Tensor, h: Tensor, w: Tensor, offs: Tensor, scale: Tensor | None = None, scaling: float = 1.0,
    ids: Tensor | None = None, bits: Tensor | None = None, p: float = 0.0, config: KernelConfig | None = None,
) -> None:  # fmt: skip
    """Adds the branches of each row's expert to y (S, D) in place, from h (S, n·r), w (E, n, r, D) and scale None or
    (E, n, D) of any strides, and offs (E,) int32.

    `bits` is a dropout mask as `draw` gives it for p and D columns, of which row ids[s], or without ids row s, is that
    of row s; it multiplies what is added. Where that is zero the bits of y do not change, nor do those of rows from
    offs[E−1] on. y needs a contiguous last dimension. Raises ValueError for shapes, strides or dtypes that do not fit
    or p outside [0, 1).
    """
    check_written("y", y)
    h = rows("h", h)
    S, D = y.shape
    check_weight(w, scale, D, dims=4)
    E, R = w.shape[0], w.shape[1] * w.shape[2]
    check_vector("offs", offs, E, torch.int32)
    mask = grouped_mask(bits, p, ids, S, D)
    if h.shape != (S, R):
        raise ValueError(f"h has shape {tuple(h.shape)}, wanted {(S, R)}.")
    if y.numel() == 0 or y.is_meta:
        return
    arch, processors = device_of(y)
    config = config or pick("grouped_expand", S // E, R, h.dtype, arch, dropout=bits is not None)
    tiles_m, tiles_d = most_tiles(S, E, config.BLOCK_M), cdiv(D, config.BLOCK_D)
    steps = min(tiles_d, cdiv(tiles_m * tiles_d, processors * config.programs))
    parts = cdiv(tiles_d, steps)
    launch(
        y, grouped_expand_kernel, (tiles_m * parts, 1),
        y_ptr=y, stride_ym=y.stride(0), h_ptr=h, stride_hm=h.stride(0), **prepare_weight(w, scale, -scaling, h.dtype),
        offs_ptr=offs, **mask, S=S, E=E, D=D, steps=steps, parts=parts, BLOCK_E=triton.next_power_of_2(E + 1),
        **tile_arguments(h.dtype, config, slice_tiles(R, config, h.element_size())),
    )  # fmt: skip
