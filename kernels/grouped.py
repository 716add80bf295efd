"""What the kernels of mixture-of-experts layers share: rows sorted by expert, and how a program finds its own.

Row s of S belongs to expert e where offs[e−1] ≤ s < offs[e]; rows from offs[E−1] on belong to none. A tile of BLOCK_M
rows never holds two experts' rows. A program counts the tiles of every expert from the E offsets, so nothing is read by
the host and no map of tiles is made: the grid has one program for each tile that there can be, and those left over do
nothing.
"""

import torch
import triton
import triton.language as tl

from .configs import cdiv
from .dropout import check_bits
from .launch import strides


@triton.jit
def find_tile(offs_ptr, pid, S, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row, end of the expert's rows) of tile pid. Expert E stands for the rows of none; a tile that does
    not exist has an expert beyond E and the end 0. BLOCK_E is more than E."""
    experts = tl.arange(0, BLOCK_E)
    starts = tl.load(offs_ptr + experts - 1, mask=(experts > 0) & (experts <= E), other=0)  # [BLOCK_E]
    ends = tl.load(offs_ptr + experts, mask=experts < E, other=0)  # [BLOCK_E]
    ends = tl.where(experts == E, S, ends)
    tiles = tl.where(experts <= E, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    last = tl.cumsum(tiles, 0)
    e = tl.sum((last <= pid).to(tl.int32), 0)
    here = experts == e
    start = tl.sum(tl.where(here, starts + (pid - last + tiles) * BLOCK_M, 0), 0)
    return e, start, tl.sum(tl.where(here, ends, 0), 0)


@triton.jit
def find_rows(index_ptr, offs_m, mask_m):
    """What index names for rows offs_m, or the rows themselves where there is no index, in int64."""
    if index_ptr is None:
        rows = offs_m.to(tl.int64)
    else:
        rows = tl.load(index_ptr + offs_m, mask=mask_m, other=0)  # [BLOCK_M]
    return rows


def most_tiles(S: int, E: int, block_m: int) -> int:
    """Tiles that S rows of E experts and of none can fill: at most one of each of them is not full."""
    return cdiv(S, block_m) + min(E, S)


def check_experts(w: torch.Tensor, scale: torch.Tensor | None, D: int) -> None:
    """A weight is (E, n, r, D) and its scale, when there is one, is (E, n, D); both may have any strides."""
    if w.dim() != 4 or w.shape[3] != D or min(w.shape[:3]) < 1:
        raise ValueError(f"w has shape {tuple(w.shape)}, wanted (E, n, r, {D}) with E, n and r at least 1.")
    E, n, _, _ = w.shape
    if scale is not None and scale.shape != (E, n, D):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, wanted {(E, n, D)}.")


def check_offsets(offs: torch.Tensor, E: int | None = None) -> int:
    """The number of experts, one or more, that the offsets are of."""
    wanted = (max(1, offs.numel()) if E is None else E,)
    if offs.shape != wanted or offs.dtype != torch.int32 or not offs.is_contiguous():
        raise ValueError(
            f"offs has shape {tuple(offs.shape)} and dtype {offs.dtype}, wanted {wanted}, int32, contiguous."
        )
    return offs.numel()


def check_index(name: str, index: torch.Tensor | None, S: int) -> None:
    """An index of rows, when there is one, is int64 (S,)."""
    if index is not None and (index.shape != (S,) or index.dtype != torch.int64 or not index.is_contiguous()):
        raise ValueError(
            f"{name} has shape {tuple(index.shape)} and dtype {index.dtype}, wanted {(S,)}, int64, contiguous."
        )


def mask_arguments(bits: torch.Tensor | None, ids: torch.Tensor | None, S: int, D: int) -> dict:
    """What a kernel is given of a mask, whose row ids[s] is that of row s: as many rows as there are in `bits`."""
    check_index("ids", ids, S)
    rows = S if bits is None or ids is None or bits.dim() != 2 else bits.shape[0]
    dropout = check_bits(bits, rows, D)
    return {
        "ids_ptr": ids if dropout else None, "bits_ptr": bits, "mask_rows": rows,
        "stride_bits": strides(bits, 2)[0], "DROPOUT": dropout,
    }  # fmt: skip


def weight_arguments(w: torch.Tensor | None, scale: torch.Tensor | None) -> dict:
    """What a kernel is given of an optional weight and its scale."""
    stride_we, stride_wi, stride_wj, stride_wd = strides(w, 4)
    stride_se, stride_si, stride_sd = strides(scale, 3)
    return {
        "w_ptr": w, "scale_ptr": scale,
        "stride_we": stride_we, "stride_wi": stride_wi, "stride_wj": stride_wj, "stride_wd": stride_wd,
        "stride_se": stride_se, "stride_si": stride_si, "stride_sd": stride_sd, "HAS_SCALE": scale is not None,
    }  # fmt: skip


def as_one_branch(w: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Branches without a scale as one of rank n·r where their rows lie evenly apart, which takes no division."""
    E, n, r, D = w.shape
    return w.reshape(E, 1, n * r, D) if scale is None and w.stride(1) == r * w.stride(2) else w
