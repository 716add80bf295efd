"""One dropout mask for all branches, regenerated on the tile from a seed and never stored.

Element (m, k) of an (M, K) input belongs to Philox counter m·⌈K/8⌉ + k//8; the four 32-bit words of that counter are
eight 16-bit words, the low half first, and element k takes word k mod 8. It is kept when its word is at least
T = round(65536·p), so the keep probability is exactly (65536 − T)/65536 and its inverse is applied to the sums. The
mask depends on the seed, the element and K alone, not on the tile that asks.
"""

import torch
import triton
import triton.language as tl

from .configs import cdiv
from .launch import launch


def drop_threshold(p: float) -> int:
    """T: a 16-bit word below it drops the element. Raises ValueError for p outside [0, 1)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p is {p}, wanted a dropout probability in [0, 1).")
    return min(round(65536 * p), 65535)


def check_seed(seed: torch.Tensor | None, p: float) -> bool:
    """Whether dropout is on. Raises ValueError when it is and `seed` is not one int64 element."""
    if p == 0.0 or seed is None:
        drop_threshold(p)
        return False
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed has dtype {seed.dtype} and {seed.numel()} elements, wanted one int64 element.")
    return True


@triton.jit
def keep_tile(seed_ptr, offs_m, start_k, K, threshold, BLOCK_K: tl.constexpr):
    """keep (BLOCK_M, BLOCK_K) for rows offs_m and BLOCK_K columns from start_k, a multiple of 8."""
    seed = tl.load(seed_ptr)
    offs_g = start_k // 8 + tl.arange(0, BLOCK_K // 8)
    counter = offs_m.to(tl.int64)[:, None] * tl.cdiv(K, 8) + offs_g[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.uint32, bitcast=True)
    # word ≥ T on 16 bits is word·2¹⁶ ≥ T·2¹⁶ on 32: the high half needs no shift, whatever its low bits are.
    bound = threshold.to(tl.uint32) << 16
    keep = tl.join((words << 16) >= bound, words >= bound)
    return tl.reshape(keep, (offs_m.shape[0], BLOCK_K))


@triton.jit
def keep_inverse(threshold, dtype: tl.constexpr):
    """1/(1 − p) for the probability the threshold really has."""
    return tl.full((), 65536, dtype) / (65536 - threshold).to(dtype)


@triton.jit(do_not_specialize=["M", "threshold"])
def dropout_mask_kernel(seed_ptr, out_ptr, M, K, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    num_k = tl.cdiv(K, BLOCK_K)
    offs_m = (pid // num_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_k = ((pid % num_k) * BLOCK_K).to(tl.int32)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    keep = keep_tile(seed_ptr, offs_m, start_k, K, threshold, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    tl.store(out_ptr + offs_m[:, None] * K + offs_k[None, :], keep, mask=mask)


def dropout_mask(seed: torch.Tensor, M: int, K: int, p: float, BLOCK_M: int = 32, BLOCK_K: int = 64) -> torch.Tensor:
    """The keep mask, bool (M, K), that shrink, expand and reduce regenerate from `seed` (int64, one element) and `p`.

    Raises ValueError when p is outside [0, 1) or the seed is not one int64 element.
    """
    threshold = drop_threshold(p)
    check_seed(seed, p)
    out = torch.empty((M, K), dtype=torch.bool, device=seed.device)
    if out.numel() == 0 or out.is_meta:
        return out
    grid = (cdiv(M, BLOCK_M) * cdiv(K, BLOCK_K), 1)
    launch(
        seed, dropout_mask_kernel, grid,
        seed_ptr=seed, out_ptr=out, M=M, K=K, threshold=threshold, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return out
