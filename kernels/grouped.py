"""Shared by the kernels of mixture-of-experts layers: rows sorted by expert, and how a program finds its own.

Row s of S belongs to expert e where offs[e−1] ≤ s < offs[e]; rows from offs[E−1] on belong to none. A tile of BLOCK_M
rows never spans two experts. Each program finds its tile from the E offsets, so the host reads nothing and builds no
map of tiles. The grid has a program for every tile that may exist, and those left over do nothing.
"""

import torch
import triton
import triton.language as tl

from .configs import cdiv
from .dropout import mask_arguments


@triton.jit
def find_tile(offs_ptr, pid, S, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, its rows [BLOCK_M], which of them exist) of tile pid.

    Index E stands for rows that belong to no expert. A tile that does not exist has an expert beyond E and no rows.
    BLOCK_E is more than E.
    """
    experts = tl.arange(0, BLOCK_E)
    starts = tl.load(offs_ptr + experts - 1, mask=(experts > 0) & (experts <= E), other=0)  # [BLOCK_E]
    ends = tl.load(offs_ptr + experts, mask=experts < E, other=0)  # [BLOCK_E]
    ends = tl.where(experts == E, S, ends)
    tiles = tl.where(experts <= E, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    last = tl.cumsum(tiles, 0)
    e = tl.sum((last <= pid).to(tl.int32), 0)
    here = experts == e
    offs_m = tl.sum(tl.where(here, starts + (pid - last + tiles) * BLOCK_M, 0), 0) + tl.arange(0, BLOCK_M)
    return e, offs_m, offs_m < tl.sum(tl.where(here, ends, 0), 0)


@triton.jit
def find_rows(index_ptr, offs_m, mask_m):
    """index[offs_m], or offs_m where there is no index, in int64 [BLOCK_M]."""
    if index_ptr is None:
        rows = offs_m.to(tl.int64)
    else:
        rows = tl.load(index_ptr + offs_m, mask=mask_m, other=0)  # [BLOCK_M]
    return rows


def most_tiles(S: int, E: int, block_m: int) -> int:
    """The most tiles that S rows of E experts and of none can take: each has at most one that is not full."""
    return cdiv(S, block_m) + min(E, S)


def check_vector(name: str, given: torch.Tensor | None, size: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless `given` is None or a contiguous (size,) of `dtype`."""
    if given is not None and (given.shape != (size,) or given.dtype != dtype or not given.is_contiguous()):
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, dtype {given.dtype}, wanted {(size,)}, {dtype}, contiguous."
        )


def grouped_mask(bits: torch.Tensor | None, p: float, ids: torch.Tensor | None, S: int, D: int) -> dict:
    """The arguments for an optional mask, whose row ids[s], or without ids row s, is that of row s."""
    check_vector("ids", ids, S, torch.int64)
    mask_rows = S if bits is None or ids is None or bits.dim() != 2 else bits.shape[0]
    ids = None if bits is None else ids
    return mask_arguments(bits, p, mask_rows, D) | {"ids_ptr": ids, "mask_rows": mask_rows}
