"""B̃ once per call: c·s⊙w of every branch, stacked as (R, D) in the dtype of the product."""

import torch
import triton
import triton.language as tl

from .configs import cdiv
from .launch import check_weight, launch, strides


@triton.jit
def pack_kernel(
    w_ptr, scale_ptr, out_ptr, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
    scaling: tl.constexpr, r: tl.constexpr, R: tl.constexpr, HAS_SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    num_d = tl.cdiv(D, BLOCK_D)
    offs_c = (pid // num_d) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = ((pid % num_d) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    i, j = (offs_c // r).to(tl.int64), (offs_c % r).to(tl.int64)
    mask_d = offs_d < D
    mask = (offs_c < R)[:, None] & mask_d[None, :]
    w_ptrs = w_ptr + i[:, None] * stride_wi + j[:, None] * stride_wj + offs_d[None, :] * stride_wd
    w = tl.load(w_ptrs, mask=mask, other=0.0).to(ACC) * scaling
    if HAS_SCALE:
        s = tl.load(scale_ptr + i[:, None] * stride_si + offs_d[None, :] * stride_sd, mask=mask, other=0.0)
        w *= s.to(ACC)
    out_ptrs = out_ptr + offs_c.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, w.to(out_ptr.dtype.element_ty), mask=mask)


def pack(w: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None, scaling: float = 1.0) -> torch.Tensor:
    """scaling·scale⊙w as a contiguous (n·r, D) tensor in `dtype`; w (n, r, D) and scale None or (n, D), any strides.

    The product is taken in float32 and rounded once. Raises ValueError when the shapes do not agree.
    """
    n, r, D = w.shape
    check_weight(w, scale, D)
    out = torch.empty((n * r, D), dtype=dtype, device=w.device)
    if out.numel() == 0 or out.is_meta:
        return out
    BLOCK_R, BLOCK_D = 32, 128
    grid = (cdiv(n * r, BLOCK_R) * cdiv(D, BLOCK_D), 1)
    stride_wi, stride_wj, stride_wd = w.stride()
    stride_si, stride_sd = strides(scale, 2)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    launch(
        w, pack_kernel, grid,
        w_ptr=w, scale_ptr=scale, out_ptr=out, D=D,
        stride_wi=stride_wi, stride_wj=stride_wj, stride_wd=stride_wd, stride_si=stride_si, stride_sd=stride_sd,
        scaling=float(scaling), r=r, R=n * r, HAS_SCALE=scale is not None, ACC=acc,
        BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=4,
    )  # fmt: skip
    return out
