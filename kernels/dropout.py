"""One dropout mask for all branches, drawn as bits from a seed once per forward and once per backward, and not kept.

Element (m, k) of an (M, K) input belongs to Philox 4×32-7 counter m·⌈K/8⌉ + k//8. The four 32-bit words of that counter
are eight 16-bit words, the low half first, and element k takes word k mod 8. It is kept when its word is at least
T = round(65536·p), so the keep probability is exactly (65536 − T)/65536, and the sums are multiplied by its inverse.
The mask depends on the seed, the element and K alone. Bit k mod 32 of word k // 32 of row m is 1 where it is kept.
"""

import torch
import triton
import triton.language as tl

from .configs import cdiv
from .launch import launch, launch_options

ROUNDS = tl.constexpr(7)  # of Philox: the fewest that pass BigCrush (Salmon et al., 2011)


def drop_threshold(p: float) -> int:
    """T: a 16-bit word below it drops the element. Raises ValueError for p outside [0, 1)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p is {p}, wanted a dropout probability in [0, 1).")
    return min(round(65536 * p), 65535)


def mask_arguments(bits: torch.Tensor | None, p: float, M: int, K: int) -> dict:
    """The arguments for an optional mask, int32 (M, ⌈K/32⌉). Raises ValueError when it is another or for a wrong p."""
    threshold, wanted = drop_threshold(p), (M, cdiv(K, 32))
    if bits is not None and (bits.dtype != torch.int32 or bits.shape != wanted or not bits.is_contiguous()):
        raise ValueError(f"bits has shape {tuple(bits.shape)}, dtype {bits.dtype}, wanted {wanted}, int32, contiguous.")
    return {"bits_ptr": bits, "stride_bits": 0 if bits is None else wanted[1], "threshold": threshold}


@triton.jit
def unpack(words, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Words [BLOCK_M, BLOCK_K/32] as a boolean tile [BLOCK_M, BLOCK_K]."""
    # A shift a pair, and masks that are constants: 32 masks would stay in registers, and the LLVM of Triton 3.6 would
    # gather the tests of a whole tile in one vector of bits, which takes two to three instructions more an element.
    pairs = words[:, :, None] >> (2 * tl.arange(0, 16))[None, None, :]
    bits = pairs[:, :, :, None] & (1 + tl.arange(0, 2))[None, None, None, :]
    return tl.reshape(bits, (BLOCK_M, BLOCK_K)) != 0


@triton.jit
def keep_tile(mask, rows, start_k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether elements are kept [BLOCK_M, BLOCK_K], in `rows` of the mask and columns from start_k, a multiple of 32.

    `mask` is (bits_ptr, stride_bits, M, threshold). What lies beyond its M rows of stride_bits words is dropped.
    """
    bits_ptr, stride_bits, M, _ = mask
    offs_w = start_k // 32 + tl.arange(0, BLOCK_K // 32)
    inside = (rows < M)[:, None] & (offs_w < stride_bits)[None, :]
    ptrs = bits_ptr + rows.to(tl.int64)[:, None] * stride_bits + offs_w[None, :]
    return unpack(tl.load(ptrs, mask=inside, other=0), BLOCK_M, BLOCK_K)  # [BLOCK_M, BLOCK_K / 32]


@triton.jit
def drop_sum(acc, mask, rows, start_k, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """keep/(1−p) ⊙ acc [BLOCK_M, BLOCK_K], or acc where there is no mask."""
    if mask[0] is not None:
        keep = keep_tile(mask, rows, start_k, BLOCK_M, BLOCK_K)
        acc = tl.where(keep, acc * keep_inverse(mask, acc.dtype), 0.0)
    return acc


@triton.jit
def keep_inverse(mask, dtype: tl.constexpr):
    """1/(1−p) for the probability that the threshold stands for, 1 where there is no mask."""
    inverse = tl.full((), 1, dtype)
    if mask[0] is not None:
        inverse = tl.full((), 65536, dtype) / (65536 - mask[3]).to(dtype)
    return inverse


@triton.jit
def keep_pair(word, bound, first: tl.constexpr):
    """Bits `first` and `first` + 1: whether the low and the high half of a 32-bit word reach the threshold."""
    # word ≥ T on 16 bits is word·2¹⁶ ≥ T·2¹⁶ on 32: the high half needs no shift, whatever its low bits are.
    word = word.to(tl.uint32, bitcast=True)
    low = tl.where((word << 16) >= bound, 1 << first, 0)
    high = tl.where(word >= bound, 2 << first, 0)
    return (low | high).to(tl.uint32)


@triton.jit
def keep_words(seed, offs_m, offs_w, K, threshold):
    """Words offs_w of rows offs_m of the mask [BLOCK_M, BLOCK_W]."""
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
    out_ptr,  # the mask [M, ⌈K/32⌉] int32 where BITS, else [M, K]
    M,  # tokens
    K,  # features
    threshold,  # T
    BITS: tl.constexpr,  # whether bits are wanted, or numbers
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,  # words
):
    """out[m, k] = philox(seed, m·⌈K/8⌉ + k//8)[k mod 8] ≥ T

    Bytes: M·⌈K/32⌉·4 written as bits, which each kernel that drops reads once; M·K elements written as numbers.
    """
    pid, row = tl.program_id(0), tl.cdiv(K, 32)
    num_w = tl.cdiv(row, BLOCK_W)
    offs_m = (pid // num_w).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M)[:, None]
    start_w = (pid % num_w) * BLOCK_W
    offs_w = start_w + tl.arange(0, BLOCK_W)
    words = keep_words(tl.load(seed_ptr), offs_m, offs_w, K, threshold)  # [BLOCK_M, BLOCK_W]
    if BITS:
        tl.store(out_ptr + offs_m[:, None] * row + offs_w[None, :], words, mask=mask_m & (offs_w < row)[None, :])
    else:
        offs_k = start_w * 32 + tl.arange(0, BLOCK_W * 32)
        keep = unpack(words, BLOCK_M, BLOCK_W * 32).to(tl.float32)  # [BLOCK_M, 32 BLOCK_W]
        ptrs = out_ptr + offs_m[:, None] * K + offs_k[None, :]
        tl.store(ptrs, keep.to(out_ptr.dtype.element_ty), mask=mask_m & (offs_k < K)[None, :])


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
        seed_ptr=seed, out_ptr=out, M=M, K=K, threshold=threshold, BITS=bits,
        BLOCK_M=BLOCK_M, BLOCK_W=BLOCK_W, **launch_options(),
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
