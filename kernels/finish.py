"""The second pass of reduce: adds the parts of P (S, D, R) in order, and makes the gradients of it in registers.

    dAᵢ = Pᵢᵀ        dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ)

Bytes: the parts read once, B and s read once, the gradients written.
"""

import triton
import triton.language as tl

from .configs import cdiv
from .launch import TL_DTYPES, launch, small_options, strides


@triton.jit
def finish_tile(
    parts_ptr,  # (S, D, R)
    w_ptr,
    scale_ptr,
    dw_ptr,
    ds_ptr,
    i,  # the branch
    offs_d,
    D,
    parts,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_si,
    stride_sd,
    scaling: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LORA_B: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Branch i for features offs_d: P_i = Σ_s parts[s] in order; dB_i = scaling·scale_i ⊙ P_i (D, r) and
    ds_i = scaling·rowsum(w_i ⊙ P_i) where LORA_B, otherwise dA_i = P_iᵀ (r, D)."""
    mask_d = offs_d < D
    factor = tl.full((BLOCK_D,), scaling, ACC)
    if HAS_SCALE:
        factor *= tl.load(scale_ptr + i * stride_si + offs_d * stride_sd, mask=mask_d, other=0.0).to(ACC)  # [BLOCK_D]
    stride_part = tl.full((), R, tl.int64) * D
    ds = tl.zeros((BLOCK_D,), ACC)
    for start_j in range(0, r, BLOCK_R):
        offs_j = start_j + tl.arange(0, BLOCK_R)
        mask = mask_d[:, None] & (offs_j < r)[None, :]
        wide_j = offs_j.to(tl.int64)[None, :]
        ptrs = parts_ptr + offs_d[:, None] * R + i * r + wide_j
        total = tl.zeros((BLOCK_D, BLOCK_R), ACC)
        for _ in range(parts):
            total += tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK_D, BLOCK_R]
            ptrs += stride_part
        if LORA_B:
            w_ptrs = w_ptr + i * stride_wi + wide_j * stride_wj + offs_d[:, None] * stride_wd
            ds += tl.sum(tl.load(w_ptrs, mask=mask, other=0.0).to(ACC) * total, axis=1)  # [BLOCK_D, BLOCK_R]
            dw_ptrs = dw_ptr + (i * D + offs_d[:, None]) * r + wide_j
            total *= factor[:, None]
        else:
            dw_ptrs = dw_ptr + (i * r + wide_j) * D + offs_d[:, None]
        tl.store(dw_ptrs, total.to(dw_ptr.dtype.element_ty), mask=mask)
    if LORA_B:
        tl.store(ds_ptr + i * D + offs_d, ds * scaling, mask=mask_d)


@triton.jit(do_not_specialize=["parts_b", "parts_a"])
def finish_kernel(
    parts_b_ptr,  # (parts_b, N, R), or None where there is no gradient of lora_B
    w_ptr,  # lora_B as (n, r, N), any strides
    scale_ptr,  # (n, N), any strides, or None
    db_ptr,  # (n, N, r)
    ds_ptr,  # (n, N)
    parts_a_ptr,  # (parts_a, K, R), or None where there is no gradient of lora_A
    da_ptr,  # (n, r, K)
    N,
    K,
    parts_b,
    parts_a,
    stride_wi,
    stride_wj,
    stride_wd,
    stride_si,
    stride_sd,
    scaling: tl.constexpr,
    n: tl.constexpr,
    r: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANT_B: tl.constexpr,
    WANT_A: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The first ⌈N/BLOCK_D⌉·n programs give dB and ds, the others dA."""
    pid, first_a = tl.program_id(0), 0
    if WANT_B:
        tiles_b = tl.cdiv(N, BLOCK_D)
        first_a = tiles_b * n
        if pid < first_a:
            offs_n = (pid % tiles_b).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
            finish_tile(
                parts_b_ptr, w_ptr, scale_ptr, db_ptr, ds_ptr, (pid // tiles_b).to(tl.int64), offs_n, N, parts_b,
                stride_wi, stride_wj, stride_wd, stride_si, stride_sd,
                scaling, r, n * r, HAS_SCALE, True, ACC, BLOCK_D, BLOCK_R,
            )  # fmt: skip
    if WANT_A:  # noqa: SIM102 (a constant, which leaves the rest out)
        if pid >= first_a:
            tiles_a = tl.cdiv(K, BLOCK_D)
            offs_k = ((pid - first_a) % tiles_a).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
            finish_tile(
                parts_a_ptr, None, None, da_ptr, None, ((pid - first_a) // tiles_a).to(tl.int64), offs_k, K, parts_a,
                0, 0, 0, 0, 0, 1.0, r, n * r, False, False, ACC, BLOCK_D, BLOCK_R,
            )  # fmt: skip


def finish(parts_b, w, scale, scaling, db, ds, parts_a, da):
    """The second pass into db (n, N, r) and ds (n, N), into da (n, r, K), or into all three; None for what is not."""
    want_b, want_a = db is not None, da is not None
    (n, N, r), parts = (db.shape, parts_b) if want_b else ((da.shape[0], 0, da.shape[1]), parts_a)
    K = da.shape[2] if want_a else 0
    BLOCK_D, BLOCK_R = 32, 16 if r <= 16 else 32
    stride_wi, stride_wj, stride_wd = strides(w, 3)
    stride_si, stride_sd = strides(scale, 2)
    launch(
        parts, finish_kernel, ((cdiv(N, BLOCK_D) + cdiv(K, BLOCK_D)) * n, 1),
        parts_b_ptr=parts_b, w_ptr=w, scale_ptr=scale, db_ptr=db, ds_ptr=ds, parts_a_ptr=parts_a, da_ptr=da, N=N, K=K,
        parts_b=parts_b.shape[0] if want_b else 0, parts_a=parts_a.shape[0] if want_a else 0,
        stride_wi=stride_wi, stride_wj=stride_wj, stride_wd=stride_wd, stride_si=stride_si, stride_sd=stride_sd,
        scaling=float(scaling), n=n, r=r, HAS_SCALE=scale is not None, WANT_B=want_b, WANT_A=want_a,
        ACC=TL_DTYPES[parts.dtype], BLOCK_D=BLOCK_D, BLOCK_R=BLOCK_R, **small_options(),
    )  # fmt: skip
