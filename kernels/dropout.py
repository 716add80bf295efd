"""One dropout mask for all branches, drawn as bits from a seed once per forward and once per backward, and not kept.

Element (m, k) of an (M, K) input belongs to Philox 4×32-7 counter m·⌈K/8⌉ + k//8; the four 32-bit words of that counter
are eight 16-bit words, the low half first, and element k takes word k mod 8. It is kept when its word is at least
T = round(65536·p), so the keep probability is exactly (65536 − T)/65536 and its inverse is applied to the sums. The
mask depends on the seed, the element and K alone. Bit k mod 32 of word k // 32 of row m says whether it is kept.

Bytes: M·⌈K/32⌉·4 written, and read once by each kernel that drops.
"""

import torch
import triton
import triton.language as tl

from .configs import cdiv
from .launch import launch, small_options

ROUNDS = 7  # of Philox: the fewest that pass BigCrush (Salmon et al., 2011)


def drop_threshold(p: float) -> int:
    """T: a 16-bit word below it drops the element. Raises ValueError for p outside [0, 1)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p is {p}, wanted a dropout probability in [0, 1).")
    return min(round(65536 * p), 65535)


def check_bits(bits: torch.Tensor | None, M: int, K: int) -> bool:
    """Whether there is a mask. Raises ValueError when it is not one that `draw` gives for an (M, K) input."""
    if bits is None:
        return False
    if bits.dtype != torch.int32 or bits.shape != (M, cdiv(K, 32)) or not bits.is_contiguous():
        raise ValueError(
            f"bits has shape {tuple(bits.shape)}, dtype {bits.dtype}, wanted {(M, cdiv(K, 32))}, int32, contiguous."
        )
    return True


@triton.jit
def unpack(words, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Words (BLOCK_M, BLOCK_K/32) as a boolean tile (BLOCK_M, BLOCK_K)."""
    # A shift a pair, and masks that are constants: 32 masks would stay in registers, and the LLVM of Triton 3.6 would
    # gather the tests of a whole tile in one vector of bits, which takes two to three instructions more an element.
    pairs = words[:, :, None] >> (2 * tl.arange(0, 16))[None, None, :]
    bits = pairs[:, :, :, None] & (1 + tl.arange(0, 2))[None, None, None, :]
    return tl.reshape(bits, (BLOCK_M, BLOCK_K)) != 0


@triton.jit
def keep_tile(bits_ptr, offs_m, start_k, M, stride_bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep (BLOCK_M, BLOCK_K) for rows offs_m and BLOCK_K columns from start_k, both multiples of 32.

    A row has stride_bits words; what lies beyond them, or beyond M rows, is dropped.
    """
    offs_w = start_k // 32 + tl.arange(0, BLOCK_K // 32)
    mask = (offs_m < M)[:, None] & (offs_w < stride_bits)[None, :]
    ptrs = bits_ptr + offs_m.to(tl.int64)[:, None] * stride_bits + offs_w[None, :]
    return unpack(tl.load(ptrs, mask=mask, other=0), BLOCK_M, BLOCK_K)  # [BLOCK_M, BLOCK_K / 32]


@triton.jit
def keep_inverse(threshold, dtype: tl.constexpr):
    """1/(1 − p) for the probability the threshold really has."""
    return tl.full((), 65536, dtype) / (65536 - threshold).to(dtype)


@triton.jit
def keep_pair(word, bound, first: tl.constexpr):
    """Bits `first` and `first` + 1: whether the low and the high half of a 32-bit word reach the threshold."""
    # word ≥ T on 16 bits is word·2¹⁶ ≥ T·2¹⁶ on 32: the high half needs no shift, whatever its low bits are.
    word = word.to(tl.uint32, bitcast=True)
    low = tl.where((word << 16) >= bound, 1 << first, 0)
    high = tl.where(word >= bound, 2 << first, 0)
    return (low | high).to(tl.uint32)


@triton.jit
def keep_words(seed, offs_m, offs_w, K, threshold, ROUNDS: tl.constexpr):
    """The mask (BLOCK_M, BLOCK_W) as 32-bit words, for rows offs_m and words offs_w of a row."""
    counter = offs_m.to(tl.int64)[:, None] * tl.cdiv(K, 8) + 4 * offs_w[None, :]
    bound = threshold.to(tl.uint32) << 16
    words = (counter * 0).to(tl.uint32)
    for g in tl.static_range(4):
        w0, w1, w2, w3 = tl.randint4x(seed, counter + g, n_rounds=ROUNDS)
        words |= keep_pair(w0, bound, 8 * g) | keep_pair(w1, bound, 8 * g + 2)
        words |= keep_pair(w2, bound, 8 * g + 4) | keep_pair(w3, bound, 8 * g + 6)
    return words.to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["M", "threshold"])
def mask_kernel(
    seed_ptr,  # one int64
    out_ptr,  # (M, ⌈K/32⌉) int32 when BITS, else (M, K)
    M,
    K,
    threshold,
    BITS: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    pid, row = tl.program_id(0), tl.cdiv(K, 32)
    num_w = tl.cdiv(row, BLOCK_W)
    offs_m = (pid // num_w).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_w = (pid % num_w) * BLOCK_W
    offs_w = start_w + tl.arange(0, BLOCK_W)
    words = keep_words(tl.load(seed_ptr), offs_m, offs_w, K, threshold, ROUNDS)  # [BLOCK_M, BLOCK_W]
    mask_m = (offs_m < M)[:, None]
    if BITS:
        tl.store(out_ptr + offs_m[:, None] * row + offs_w[None, :], words, mask=mask_m & (offs_w < row)[None, :])
    else:
        offs_k = start_w * 32 + tl.arange(0, BLOCK_W * 32)
        keep = (
            unpack(words, BLOCK_M, BLOCK_W * 32).to(tl.float32).to(out_ptr.dtype.element_ty)
        )  # [BLOCK_M, BLOCK_W · 32]
        tl.store(out_ptr + offs_m[:, None] * K + offs_k[None, :], keep, mask=mask_m & (offs_k < K)[None, :])


def _mask(seed: torch.Tensor, out: torch.Tensor, M: int, K: int, threshold: int, bits: bool) -> torch.Tensor:
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed has dtype {seed.dtype} and {seed.numel()} elements, wanted one int64 element.")
    if out.numel() == 0 or out.is_meta:
        return out
    words = cdiv(K, 32)
    tile = 256 if bits else 64 if K % 32 == 0 else 16  # rows that align with nothing take many registers
    BLOCK_W = min(triton.next_power_of_2(words), 64, tile)
    BLOCK_M = tile // BLOCK_W
    launch(
        seed, mask_kernel, (cdiv(M, BLOCK_M) * cdiv(words, BLOCK_W), 1),
        seed_ptr=seed, out_ptr=out, M=M, K=K, threshold=threshold, BITS=bits, ROUNDS=ROUNDS,
        BLOCK_M=BLOCK_M, BLOCK_W=BLOCK_W, **small_options(),
    )  # fmt: skip
    return out


def draw(seed: torch.Tensor | None, M: int, K: int, p: float) -> torch.Tensor | None:
    """The mask of an (M, K) input as shrink, expand and reduce take it: int32 (M, ⌈K/32⌉), None where p drops nothing.

    Raises ValueError when p is outside [0, 1) or the seed is not one int64 element.
    """
    threshold = drop_threshold(p)
    if seed is None or threshold == 0:
        return None
    return _mask(seed, torch.empty((M, cdiv(K, 32)), dtype=torch.int32, device=seed.device), M, K, threshold, True)


def dropout_mask(seed: torch.Tensor, M: int, K: int, p: float, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """The same mask as a tensor (M, K) of `dtype`, 1 where an element is kept and 0 where it is dropped.

    Raises ValueError when p is outside [0, 1) or the seed is not one int64 element.
    """
    return _mask(seed, torch.empty((M, K), dtype=dtype, device=seed.device), M, K, drop_threshold(p), False)
