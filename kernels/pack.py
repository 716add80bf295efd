"""The scaled weight c·s⊙w as the other kernels read it: scaled on the tile, or packed once per call."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import cdiv
from .launch import TL_DTYPES, check_weight, launch, launch_options, output, sum_dtype
from .tiles import weight_tile

PACK_R, PACK_D = tl.constexpr(32), tl.constexpr(128)
WEIGHT_STRIDES = ("stride_we", "stride_wi", "stride_wj", "stride_wd")
SCALE_STRIDES = ("stride_se", "stride_si", "stride_sd")


@triton.jit
def pack_tile(
    weight, out_ptr, stride_or, stride_od, pid, D,
    scaling: tl.constexpr, r: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    num_d = tl.cdiv(D, PACK_D)
    offs_c = (pid // num_d) * PACK_R + tl.arange(0, PACK_R)
    offs_d = (pid % num_d) * PACK_D + tl.arange(0, PACK_D)
    w = weight_tile(weight, offs_c, offs_d, D, scaling, r, R, DOT, ACC)  # [PACK_R, PACK_D]
    out_ptrs = out_ptr + offs_c.to(tl.int64)[:, None] * stride_or + offs_d.to(tl.int64)[None, :] * stride_od
    tl.store(out_ptrs, w, mask=(offs_c < R)[:, None] & (offs_d < D)[None, :])


@triton.jit
def pack_kernel(
    w_ptr, stride_wi, stride_wj, stride_wd,  # w [n, r, D]
    scale_ptr, stride_si, stride_sd,  # scale [n, D], or None
    out_ptr, stride_or, stride_od,  # out [R, D]
    D,  # features
    scaling: tl.constexpr,  # the constant factor c
    r: tl.constexpr,  # rank of a branch
    R: tl.constexpr,  # n·r
    DOT: tl.constexpr,  # the dtype of out
    ACC: tl.constexpr,  # the dtype that c·s⊙w is multiplied in
):  # fmt: skip
    """out[i·r + j, d] = scaling · scale[i, d] · w[i, j, d], rounded once.

    Bytes: w and scale read once, R·D elements written.
    """
    weight = (w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd)
    pack_tile(weight, out_ptr, stride_or, stride_od, tl.program_id(0), D, scaling, r, R, DOT, ACC)


class Packing(NamedTuple):
    """w (n, r, D) and scale None or (n, D), to be packed into out (n·r, D); all may have any strides."""

    w: Tensor
    scale: Tensor | None
    scaling: float
    out: Tensor

    def programs(self) -> int:
        R, D = self.out.shape
        return cdiv(R, PACK_R.value) * cdiv(D, PACK_D.value)

    def arguments(self) -> dict:
        return {
            **weight_arguments(self.w, self.scale), "out_ptr": self.out,
            "stride_or": self.out.stride(0), "stride_od": self.out.stride(1),
            "D": self.w.shape[2], "scaling": float(self.scaling), "r": self.w.shape[1],
        }  # fmt: skip

    def launch(self) -> None:
        dtype = self.out.dtype
        launch(
            self.w, pack_kernel, (self.programs(), 1), **self.arguments(), R=self.out.shape[0],
            DOT=TL_DTYPES[dtype], ACC=TL_DTYPES[sum_dtype(dtype)], **launch_options(),
        )  # fmt: skip


def pack(
    w: Tensor, dtype: torch.dtype, scale: Tensor | None = None, scaling: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """scaling·scale⊙w as (n·r, D) in `dtype`; w (n, r, D), scale None or (n, D) and `out`, when given, of any strides.

    Raises ValueError when the shapes do not agree.
    """
    n, r, D = w.shape
    check_weight(w, scale, D)
    out = output(out, (n * r, D), dtype, w)
    if out.numel() > 0 and not out.is_meta:
        Packing(w, scale, scaling, out).launch()
    return out


def weight_arguments(w: Tensor | None, scale: Tensor | None, dims: int = 3) -> dict:
    """The arguments for an optional weight of `dims` dimensions, (n, r, D) or (E, n, r, D), and its optional scale."""
    strides_w = (0,) * dims if w is None else w.stride()
    strides_s = (0,) * (dims - 1) if scale is None else scale.stride()
    names = (*WEIGHT_STRIDES[-dims:], *SCALE_STRIDES[1 - dims :])
    return {"w_ptr": w, "scale_ptr": scale, **dict(zip(names, (*strides_w, *strides_s), strict=True))}


def prepare_weight(w, scale, scaling: float, dtype: torch.dtype, packed: bool = False) -> dict:
    """The arguments for c·s⊙w, w being (n, r, D) or, of experts, (E, n, r, D): as it is or `packed`, in `dtype`.

    Branches without a scale whose rows lie evenly apart are one branch of rank n·r, which takes no division.
    """
    if packed and (scale is not None or abs(scaling) != 1.0 or w.dtype != dtype or w.stride(-1) != 1):
        w, scale, scaling = pack(w, dtype, scale, scaling)[None], None, 1.0
    *experts, n, r, D = w.shape
    if scale is None and w.stride(-3) == r * w.stride(-2):
        w = w.reshape(*experts, 1, n * r, D)
    return {**weight_arguments(w, scale, w.dim()), "scaling": float(scaling), "r": w.shape[-2], "R": n * r}
