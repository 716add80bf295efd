"""The second pass of reduce: adds the parts of P in order, and computes the gradients from the sum in registers."""

import triton
import triton.language as tl

from .configs import cdiv
from .launch import TL_DTYPES, launch, launch_options
from .pack import weight_arguments


@triton.jit
def finish_tile(
    parts_ptr, parts, dw_ptr, ds_ptr, weight, tile, D,
    scaling: tl.constexpr, n: tl.constexpr, r: tl.constexpr, ACC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One branch for BLOCK_D features: dB_i [D, r] and ds_i [D] where there is a weight, else dA_i [r, D]."""
    w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd = weight
    tiles_d = tl.cdiv(D, BLOCK_D)
    i, offs_d = (tile // tiles_d).to(tl.int64), (tile % tiles_d).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    factor = tl.full((BLOCK_D,), scaling, ACC)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr + i * stride_si + offs_d * stride_sd, mask=mask_d, other=0.0).to(ACC)  # [BLOCK_D]
    stride_part = tl.full((), n * r, tl.int64) * D
    ds = tl.zeros((BLOCK_D,), ACC)
    for start_j in range(0, r, BLOCK_R):
        offs_j = start_j + tl.arange(0, BLOCK_R)
        mask = mask_d[:, None] & (offs_j < r)[None, :]
        wide_j = offs_j.to(tl.int64)[None, :]
        ptrs = parts_ptr + offs_d[:, None] * (n * r) + i * r + wide_j
        total = tl.zeros((BLOCK_D, BLOCK_R), ACC)
        for _ in range(parts):
            total += tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_D, BLOCK_R]
            ptrs += stride_part
        if w_ptr is not None:
            w_ptrs = w_ptr + i * stride_wi + wide_j * stride_wj + offs_d[:, None] * stride_wd
            ds += tl.sum(tl.load(w_ptrs, mask=mask, other=0.0).to(ACC) * total, axis=1)  # [BLOCK_D, BLOCK_R]
            dw_ptrs = dw_ptr + (i * D + offs_d[:, None]) * r + wide_j
            total *= factor[:, None]
        else:
            dw_ptrs = dw_ptr + (i * r + wide_j) * D + offs_d[:, None]
        tl.store(dw_ptrs, total.to(dw_ptr.dtype.element_ty), mask=mask)
    if w_ptr is not None:
        tl.store(ds_ptr + i * D + offs_d, ds * scaling, mask=mask_d)


@triton.jit(do_not_specialize=["parts_b", "parts_a"])
def finish_kernel(
    parts_b_ptr,  # P in parts [parts_b, N, R], or None where lora_B wants no gradient
    parts_b,
    w_ptr, stride_wi, stride_wj, stride_wd,  # lora_B as w [n, r, N]
    scale_ptr, stride_si, stride_sd,  # scale [n, N], or None
    db_ptr,  # dB [n, N, r]
    ds_ptr,  # ds [n, N]
    parts_a_ptr,  # dÃᵀ in parts [parts_a, K, R], or None where lora_A wants no gradient
    parts_a,
    da_ptr,  # dA [n, r, K]
    N,  # out_features
    K,  # in_features
    scaling: tl.constexpr,  # the constant factor c
    n: tl.constexpr,  # branches
    r: tl.constexpr,  # rank of a branch
    ACC: tl.constexpr,  # dtype of the sums
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dB_i = c·s_i ⊙ P_i,  ds_i = c·rowsum(B_i ⊙ P_i),  dA_i = P_iᵀ,  P = Σ_s parts[s]

    The first ⌈N/BLOCK_D⌉·n programs give dB and ds, the others dA.

    Bytes: the parts read once, B and s read once, the gradients written once.
    """
    pid, first_a = tl.program_id(0), 0
    if parts_b_ptr is not None:
        first_a = tl.cdiv(N, BLOCK_D) * n
        if pid < first_a:
            weight = (w_ptr, stride_wi, stride_wj, stride_wd, scale_ptr, stride_si, stride_sd)
            finish_tile(parts_b_ptr, parts_b, db_ptr, ds_ptr, weight, pid, N, scaling, n, r, ACC, BLOCK_D, BLOCK_R)
    if parts_a_ptr is not None:  # noqa: SIM102 (a constant, which leaves the rest out)
        if pid >= first_a:
            weight = (None, 0, 0, 0, None, 0, 0)
            finish_tile(parts_a_ptr, parts_a, da_ptr, None, weight, pid - first_a, K, 1.0, n, r, ACC, BLOCK_D, BLOCK_R)


def finish(parts_b=None, w=None, scale=None, scaling=1.0, db=None, ds=None, parts_a=None, da=None) -> None:
    """The second pass into db (n, N, r) and ds (n, N), into da (n, r, K), or into all three; no parts, no gradient."""
    parts = parts_a if parts_b is None else parts_b
    if parts is None:
        return
    n, r = da.shape[:2] if parts_b is None else w.shape[:2]
    N, K = 0 if parts_b is None else db.shape[1], 0 if parts_a is None else da.shape[2]
    BLOCK_D, BLOCK_R = 32, 16 if r <= 16 else 32
    launch(
        parts, finish_kernel, ((cdiv(N, BLOCK_D) + cdiv(K, BLOCK_D)) * n, 1),
        parts_b_ptr=parts_b, parts_b=0 if parts_b is None else len(parts_b), db_ptr=db, ds_ptr=ds,
        parts_a_ptr=parts_a, parts_a=0 if parts_a is None else len(parts_a), da_ptr=da,
        **weight_arguments(w, scale), N=N, K=K, scaling=float(scaling), n=n, r=r, ACC=TL_DTYPES[parts.dtype],
        BLOCK_D=BLOCK_D, BLOCK_R=BLOCK_R, **launch_options(),
    )  # fmt: skip
