"""The dropout mask: Philox to the bit, at the right rate, the same whatever kernel or tile draws it."""

import math

import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE

from multilora_fast.kernels import dropout
from multilora_fast.kernels.configs import KernelConfig
from multilora_fast.kernels.dropout import drop_threshold, dropout_mask
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.reduce import reduce
from multilora_fast.kernels.shrink import shrink

P = 0.3


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


def philox(seed: int, counter: int) -> list[int]:
    """The four words of Philox 4×32-10 for a 64-bit counter (Salmon et al., 2011), in Python's integers."""
    low = 2**32 - 1
    c, k = [counter & low, counter >> 32 & low, 0, 0], [seed & low, seed >> 32 & low]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & low, first >> 32 ^ c[3] ^ k[1], first & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def kept(seed: int, m: int, k: int, K: int, threshold: int) -> bool:
    word = philox(seed, m * math.ceil(K / 8) + k // 8)[k % 8 // 2]
    return (word >> 16 * (k % 2) & 0xFFFF) >= threshold


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -5])
def test_the_mask_is_philox(seed):
    got = dropout_mask(seed_of(seed), 5, 21, P)
    want = [[kept(seed, m, k, 21, drop_threshold(P)) for k in range(21)] for m in range(5)]
    assert got.tolist() == want


def test_the_counter_is_64_bits_wide():
    @triton.jit
    def probe(seed_ptr, out_ptr, first_m, K, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
        offs = tl.arange(0, BLOCK_M)
        keep = dropout.keep_tile(seed_ptr, first_m + offs.to(tl.int64), 0, K, threshold, BLOCK_K)
        tl.store(out_ptr + offs[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], keep)

    first, K = 2**33 + 11, 4096
    out = torch.empty(16, 32, dtype=torch.bool, device=DEVICE)
    probe[1,](seed_ptr=seed_of(3), out_ptr=out, first_m=first, K=K, threshold=drop_threshold(P), BLOCK_M=16, BLOCK_K=32)
    assert out.tolist() == [[kept(3, first + m, k, K, drop_threshold(P)) for k in range(32)] for m in range(16)]


@pytest.mark.parametrize(
    "tile", [KernelConfig(16, 16, 1, 1), KernelConfig(32, 64, 4, 2), KernelConfig(64, 32, 4, 2)], ids=str
)
def test_every_kernel_draws_the_same_mask_whatever_its_tile(tile):
    M = K = 30
    drop, one = {"seed": seed_of(99), "p": P}, torch.ones(M, K, device=DEVICE)
    keep = dropout_mask(drop["seed"], M, K, P)
    identity = torch.eye(K, device=DEVICE)
    assert torch.equal(shrink(one, identity[None], **drop, config=tile) != 0, keep)
    assert torch.equal(reduce(identity, one, 1, one.dtype, **drop, config=tile)[0] != 0, keep)
    y = torch.zeros(M, K, device=DEVICE)
    expand(y, one, identity[None], **drop, config=tile)
    assert torch.equal(y != 0, keep)
    assert torch.equal(dropout_mask(drop["seed"], M, K, P, BLOCK_M=tile.BLOCK_M, BLOCK_K=tile.BLOCK_D), keep)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_keep_rate(p):
    M, K = 256, 1024
    mask = dropout_mask(seed_of(2024), M, K, p, BLOCK_M=64, BLOCK_K=1024).double()
    rate = 1 - drop_threshold(p) / 65536
    sigma = math.sqrt(rate * (1 - rate) / (M * K))
    assert abs(mask.mean().item() - rate) < 4 * sigma
    assert (mask.mean(0) - rate).abs().max() < 6 * sigma * math.sqrt(K)
    assert (mask.mean(1) - rate).abs().max() < 6 * sigma * math.sqrt(M)
