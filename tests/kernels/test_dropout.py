"""The dropout mask: Philox to the bit, at the right rate, the same whatever kernel or tile reads it."""

import math

import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE

from multilora_fast.kernels import dropout
from multilora_fast.kernels.configs import KernelConfig
from multilora_fast.kernels.dropout import draw, drop_threshold, dropout_mask
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.reduce import reduce
from multilora_fast.kernels.shrink import shrink

P = 0.3


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


def philox(seed: int, counter: int) -> list[int]:
    """The four words of Philox 4×32-7 for a 64-bit counter (Salmon et al., 2011), in Python's integers."""
    low = 2**32 - 1
    c, k = [counter & low, counter >> 32 & low, 0, 0], [seed & low, seed >> 32 & low]
    for _ in range(7):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & low, first >> 32 ^ c[3] ^ k[1], first & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def kept(seed: int, m: int, k: int, K: int, threshold: int) -> bool:
    word = philox(seed, m * math.ceil(K / 8) + k // 8)[k % 8 // 2]
    return (word >> 16 * (k % 2) & 0xFFFF) >= threshold


@pytest.mark.parametrize(("seed", "K"), [(0, 21), (2**63 - 1, 70), (-5, 32), (-5, 1)])
def test_the_mask_is_philox(seed, K):
    got = dropout_mask(seed_of(seed), 5, K, P)
    want = [[kept(seed, m, k, K, drop_threshold(P)) for k in range(K)] for m in range(5)]
    assert got.tolist() == want


@pytest.mark.parametrize("k", [0, 1])
def test_a_word_at_the_threshold_is_kept(k):
    """In the low and in the high half of 32 bits."""
    word = philox(0, 0)[0] >> 16 * k & 0xFFFF
    kept = [dropout_mask(seed_of(0), 1, 8, threshold / 65536)[0, k].item() for threshold in (word, word + 1)]
    assert kept == [True, False]


def test_the_counter_is_64_bits_wide():
    @triton.jit
    def probe(seed_ptr, out_ptr, first_m, K, threshold, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
        offs_m, offs_w = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_W)
        words = dropout.keep_words(tl.load(seed_ptr), first_m + offs_m.to(tl.int64), offs_w, K, threshold)
        tl.store(out_ptr + offs_m[:, None] * BLOCK_W + offs_w[None, :], words)

    first, K = 2**33 + 11, 4096
    out = torch.empty(16, 1, dtype=torch.int32, device=DEVICE)
    probe[1,](seed_ptr=seed_of(3), out_ptr=out, first_m=first, K=K, threshold=drop_threshold(P), BLOCK_M=16, BLOCK_W=1)
    assert unpacked(out, 32).tolist() == [
        [kept(3, first + m, k, K, drop_threshold(P)) for k in range(32)] for m in range(16)
    ]


def unpacked(bits, K):
    """int32 words (M, ⌈K/32⌉) as a bool mask (M, K)."""
    return (bits[:, :, None] >> torch.arange(32, device=bits.device) & 1).flatten(1)[:, :K].bool()


@pytest.mark.parametrize("shape", [(3, 1), (17, 64), (2, 2100), (19, 70)], ids=str)
def test_bits_and_mask_agree(shape):
    mask, bits = dropout_mask(seed_of(8), *shape, P), draw(seed_of(8), *shape, P)
    assert (bits.dtype, bits.shape, bits.is_contiguous()) == (torch.int32, (shape[0], -(-shape[1] // 32)), True)
    assert torch.equal(unpacked(bits, shape[1]), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_mask_in_every_dtype(dtype):
    numbers = dropout_mask(seed_of(8), 5, 21, P, dtype)
    assert numbers.dtype == dtype
    assert torch.equal(numbers, dropout_mask(seed_of(8), 5, 21, P).to(dtype))


def test_what_drops_nothing_draws_nothing():
    assert draw(seed_of(1), 4, 5, 0.0) is None
    assert draw(seed_of(1), 4, 5, 2**-18) is None
    assert draw(None, 4, 5, P) is None
    assert dropout_mask(seed_of(1), 4, 5, 0.0).all()


@pytest.mark.parametrize(("M", "tile"), [(30, (16, 32)), (40, (32, 64)), (40, (64, 32))], ids=str)
def test_every_kernel_reads_the_same_mask_whatever_its_tile(tile, M):
    tile = KernelConfig(*tile, 4, 2)
    K, seed = M, seed_of(99)
    drop, one, identity = {"bits": draw(seed, M, K, P), "p": P}, torch.ones(M, K, device=DEVICE), torch.eye(K)
    keep, identity = dropout_mask(seed, M, K, P), identity.to(DEVICE)
    assert torch.equal(shrink(one, identity[None], **drop, config=tile) != 0, keep)
    assert torch.equal(reduce(identity, one, 1, one.dtype, **drop, config=tile)[0] != 0, keep)
    for accumulate in (True, False):
        y = torch.zeros(M, K, device=DEVICE)
        expand(y, one, identity[None], **drop, accumulate=accumulate, config=tile)
        assert torch.equal(y != 0, keep)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_keep_rate(p):
    M, K = 128, 1024
    mask = unpacked(draw(seed_of(2024), M, K, p), K).double()
    rate = 1 - drop_threshold(p) / 65536
    sigma = math.sqrt(rate * (1 - rate) / (M * K))
    assert abs(mask.mean().item() - rate) < 4 * sigma
    assert (mask.mean(0) - rate).abs().max() < 6 * sigma * math.sqrt(K)
    assert (mask.mean(1) - rate).abs().max() < 6 * sigma * math.sqrt(M)
