"""B̃ᵀ once per call: c·s⊙w of every branch, stacked as (R, D) in the dtype of the product.

    out[i·r + j, d] = scaling · scale[i, d] · w[i, j, d]

Bytes: w and scale read once, R·D written. The product is taken in float32 and rounded once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .configs import cdiv
from .launch import TL_DTYPES, check_weight, launch, small_options, strides, sum_dtype

BLOCK_R, BLOCK_D = 32, 128


@triton.jit
def weight_tile(
    w_ptr,  # (n, r, D), any strides
    scale_ptr,  # (n, D), any strides, or None
    offs_c,  # columns of H: row c mod r of branch c // r
    offs_d,
    D,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_si,
    stride_sd,
    scaling: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
):
    """scaling·scale⊙w (BLOCK_R, BLOCK_D) in DOT, multiplied in ACC before the cast."""
    i, j, wide_d = (offs_c // r).to(tl.int64)[:, None], (offs_c % r).to(tl.int64)[:, None], offs_d.to(tl.int64)[None, :]
    mask = (offs_c < R)[:, None] & (offs_d < D)[None, :]
    w = tl.load(w_ptr + (i * stride_wi + j * stride_wj) + wide_d * stride_wd, mask=mask, other=0.0)
    if HAS_SCALE:
        s = tl.load(scale_ptr + i * stride_si + wide_d * stride_sd, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_D]
        w = w.to(ACC) * (scaling * s.to(ACC))
    elif scaling != 1.0:
        w = w.to(ACC) * scaling
    return w.to(DOT)


@triton.jit
def pack_kernel(
    w_ptr,  # (n, r, D), any strides
    scale_ptr,  # (n, D), any strides, or None
    out_ptr,  # (R, D), any strides
    first,  # program, of those that pack
    D,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_si,
    stride_sd,
    stride_or,
    stride_od,
    scaling: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0) - first
    num_d = tl.cdiv(D, BLOCK_D)
    offs_c = (pid // num_d) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = (pid % num_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    w = weight_tile(
        w_ptr, scale_ptr, offs_c, offs_d, D, stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
        scaling, r, R, HAS_SCALE, DOT, ACC,
    )  # fmt: skip
    out_ptrs = out_ptr + offs_c.to(tl.int64)[:, None] * stride_or + offs_d.to(tl.int64)[None, :] * stride_od
    tl.store(out_ptrs, w, mask=(offs_c < R)[:, None] & (offs_d < D)[None, :])


def pack(
    w: torch.Tensor,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    scaling: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """scaling·scale⊙w as (n·r, D) in `dtype`; w (n, r, D), scale None or (n, D) and `out`, when given, of any strides.

    Raises ValueError when the shapes do not agree.
    """
    n, r, D = w.shape
    check_weight(w, scale, D)
    if out is None:
        out = torch.empty((n * r, D), dtype=dtype, device=w.device)
    elif out.shape != (n * r, D) or out.dtype != dtype:
        raise ValueError(f"out has shape {tuple(out.shape)} and dtype {out.dtype}, wanted {(n * r, D)} and {dtype}.")
    if out.numel() == 0 or out.is_meta:
        return out
    stride_wi, stride_wj, stride_wd = w.stride()
    stride_si, stride_sd = strides(scale, 2)
    launch(
        w, pack_kernel, (cdiv(n * r, BLOCK_R) * cdiv(D, BLOCK_D), 1),
        w_ptr=w, scale_ptr=scale, out_ptr=out, first=0, D=D,
        stride_wi=stride_wi, stride_wj=stride_wj, stride_wd=stride_wd, stride_si=stride_si, stride_sd=stride_sd,
        stride_or=out.stride(0), stride_od=out.stride(1),
        scaling=float(scaling), r=r, R=n * r, HAS_SCALE=scale is not None,
        DOT=TL_DTYPES[dtype], ACC=TL_DTYPES[sum_dtype(dtype)], BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, **small_options(),
    )  # fmt: skip
    return out


class Packing(NamedTuple):
    """A pack that another launch may do beside its own work: w (n, r, N), its scale, and out (n·r, N)."""

    w: torch.Tensor
    scale: torch.Tensor | None
    scaling: float
    out: torch.Tensor

    def programs(self) -> int:
        n, r, N = self.w.shape
        return cdiv(n * r, BLOCK_R) * cdiv(N, BLOCK_D)

    def arguments(self, tiles: int) -> dict:
        """What a kernel is given whose programs from `tiles` on pack."""
        stride_bi, stride_bj, stride_bn = self.w.stride()
        stride_ci, stride_cn = strides(self.scale, 2)
        return {
            "b_ptr": self.w, "b_scale_ptr": self.scale, "packed_ptr": self.out, "tiles": tiles, "N": self.w.shape[2],
            "stride_bi": stride_bi, "stride_bj": stride_bj, "stride_bn": stride_bn,
            "stride_ci": stride_ci, "stride_cn": stride_cn,
            "stride_pr": self.out.stride(0), "stride_pn": self.out.stride(1),
            "b_scaling": float(self.scaling), "b_r": self.w.shape[1], "B_SCALE": self.scale is not None,
            "PACK_R": BLOCK_R, "PACK_N": BLOCK_D,
        }  # fmt: skip

    def launch(self) -> None:
        pack(self.w, self.out.dtype, self.scale, self.scaling, out=self.out)


# What the same kernel is given where nothing is packed.
NO_PACKING = dict.fromkeys((
    "b_ptr", "b_scale_ptr", "packed_ptr", "tiles", "N", "stride_bi", "stride_bj", "stride_bn", "stride_ci", "stride_cn",
    "stride_pr", "stride_pn", "b_scaling", "b_r", "B_SCALE", "PACK_R", "PACK_N",
))  # fmt: skip
