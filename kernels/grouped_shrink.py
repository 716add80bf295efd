"""shrink by experts: H = x̂ Ã_eᵀ forward, dH = dy B̃_e backward, for S rows sorted by expert.

One program owns a tile of one expert's rows and as many of the R columns as its configuration holds. It gathers x by
row, so no sorted copy is made, and scales the weight on the tile, so none is packed. Rows of no expert get zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import KernelConfig, cdiv, device_of, pick, rank_tiles
from .grouped import check_vector, find_rows, find_tile, grouped_mask, most_tiles
from .launch import check_weight, launch, rows, tile_arguments
from .pack import prepare_weight
from .shrink import shrink_tile


@triton.jit(do_not_specialize=["S", "E", "mask_rows", "threshold"])
def grouped_shrink_kernel(
    x_ptr, stride_xm,  # x [T, D]
    w_ptr, stride_we, stride_wi, stride_wj, stride_wd,  # w [E, n, r, D]
    scale_ptr, stride_se, stride_si, stride_sd,  # scale [E, n, D], or None
    out_ptr,  # H [S, R]
    offs_ptr,  # ends of the experts' rows [E]
    index_ptr,  # rows of x [S], or None where T is S
    ids_ptr,  # rows of the mask [S], or None where they are 0 to S
    bits_ptr, stride_bits,  # mask [mask_rows, ⌈D/32⌉], or None
    mask_rows,
    threshold,  # 65536·p
    S,  # rows
    E,  # experts
    D,  # features
    scaling: tl.constexpr,  # the constant factor c
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
    """H[s, i·r + j] = Σ_d x̂[index[s], d] · scaling · scale[e, i, d] · w[e, i, j, d],  e the expert of row s

    Bytes: x read once a row, H written once; w and scale of an expert read once by each of its tiles, which L2 serves.
    A mask adds S·⌈D/32⌉·4.
    """
    chunks: tl.constexpr = (R + BLOCK_R + BLOCK_R2 - 1) // (BLOCK_R + BLOCK_R2)
    pid = tl.program_id(0)
    e, offs_m, mask_m = find_tile(offs_ptr, pid // chunks, S, E, BLOCK_M, BLOCK_E)
    w_ptr += e.to(tl.int64) * stride_we
    if scale_ptr is not None:
        scale_ptr += e.to(tl.int64) * stride_se
    shrink_tile(
        x_ptr + find_rows(index_ptr, offs_m, mask_m)[:, None] * stride_xm, mask_m[:, None],
        out_ptr, R, offs_m,
        (bits_ptr, stride_bits, mask_rows, threshold), find_rows(ids_ptr, offs_m, mask_m),
        (w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd),
        (pid % chunks) * (BLOCK_R + BLOCK_R2), 0, tl.where(e < E, D, 0), D,
        scaling, r, R, DOT, ACC, BLOCK_M, BLOCK_D, BLOCK_R, BLOCK_R2,
    )  # fmt: skip


def grouped_shrink(
    x: Tensor, w: Tensor, offs: Tensor, scale: Tensor | None = None, scaling: float = 1.0, index: Tensor | None = None,
    ids: Tensor | None = None, bits: Tensor | None = None, p: float = 0.0, config: KernelConfig | None = None,
) -> Tensor:  # fmt: skip
    """H (S, n·r) in x's dtype, from w (E, n, r, D) and scale None or (E, n, D) of any strides, and offs (E,) int32.

    Row s reads row index[s] of x (T, D), index being int64 (S,), or without index row s of x (S, D). `bits` is a
    dropout mask as `draw` gives it for p and D columns, of which row ids[s] is that of row s, or without ids row s.
    Rows from offs[E−1] on are zero. Sums are float32, for float64 x float64. Raises ValueError for shapes or dtypes
    that do not agree or p outside [0, 1).
    """
    x = rows("x", x)
    S, D = x.shape[0] if index is None else index.numel(), x.shape[1]
    check_weight(w, scale, D, dims=4)
    E, R = w.shape[0], w.shape[1] * w.shape[2]
    check_vector("offs", offs, E, torch.int32)
    check_vector("index", index, S, torch.int64)
    mask = grouped_mask(bits, p, ids, S, D)
    out = torch.empty((S, R), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or out.is_meta:
        return out
    config = config or pick("grouped_shrink", S // E, R, x.dtype, device_of(x)[0], dropout=bits is not None)
    blocks = rank_tiles(R, config)
    launch(
        x, grouped_shrink_kernel, (most_tiles(S, E, config.BLOCK_M) * cdiv(R, sum(blocks)), 1),
        x_ptr=x, stride_xm=x.stride(0), **prepare_weight(w, scale, scaling, x.dtype), out_ptr=out, offs_ptr=offs,
        index_ptr=index, **mask, S=S, E=E, D=D, **tile_arguments(x.dtype, config, blocks),
        BLOCK_E=triton.next_power_of_2(E + 1),
    )  # fmt: skip
    return out
