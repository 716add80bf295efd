"""One layer's tensors for the joint kernel in both directions, and the formula of each."""

import pytest
import torch
from device import DEVICE
from formulas import ALPHA, P, make, within
from torch.nn import functional as F

from multilora_fast.kernels.configs import PRODUCT_TILES, device_of
from multilora_fast.kernels.dropout import drop_threshold
from multilora_fast.kernels.product import product

needs_copy_engine = pytest.mark.skipif(
    DEVICE == "cuda" and device_of(torch.empty(0, device=DEVICE))[0] not in PRODUCT_TILES,
    reason="needs an architecture with a copy engine",
)


def padded(M, R, dtype):
    """(M, R) whose rows are a multiple of 16 bytes apart, as a descriptor wants them."""
    return make(M, -(-R // 8) * 8, dtype=dtype)[:, :R]


def packed_bits(keep: torch.Tensor) -> torch.Tensor:
    """int32 (M, ⌈N/32⌉) from bool (M, N): bit n mod 32 of word n // 32."""
    M, N = keep.shape
    words = F.pad(keep.long(), (0, -N % 32)).reshape(M, -1, 32) << torch.arange(32, device=keep.device)
    return words.sum(2).to(torch.int32)


class Problem:
    """One layer's tensors for both directions, a mask for backward, and the formula of each."""

    def __init__(self, shape, dtype, params=None, scalar=False, p=P):
        M, K, N, self.n, r = shape
        params, self.p, self.dtype = params or dtype, p, dtype
        self.x, self.dy, self.weight = make(M, K, dtype=dtype), make(M, N, dtype=dtype), make(N, K, dtype=dtype)
        self.bias, self.h = make(N, dtype=params), padded(M, self.n * r, dtype)
        self.a, self.b = make(self.n, r, K, dtype=params), make(self.n, N, r, dtype=params).transpose(1, 2)
        self.scale = (make(self.n, 1, dtype=params) if scalar else make(self.n, N, dtype=params)).expand(self.n, N)
        self.mask = torch.rand(M, K, device=DEVICE) >= p
        self.keep = self.mask.double() * 65536 / (65536 - drop_threshold(p))

    def forward(self, **options):
        return product(
            self.x, self.weight, self.bias, self.h, self.b, self.scale, ALPHA, transposed=True, **options
        )  # fmt: skip

    def backward(self, **options):
        bits = packed_bits(self.mask) if self.p else None
        return product(self.dy, self.weight, None, self.h, self.a, bits=bits, p=self.p, transposed=False, **options)

    def check(self, y, dx):
        """Both outputs by the 2× rule."""
        inputs, scaled = (self.x, self.weight, self.bias, self.h, self.b), ALPHA * self.scale.double()
        within(y, self.formula_forward, *inputs, dtype=self.dtype, factors=(scaled,))
        inputs = (self.dy, self.weight, self.h, self.a)
        within(dx, self.formula_backward, *inputs, dtype=self.dtype, factors=(self.keep,))

    def formula_forward(self, x, weight, bias, h, b, scale):
        heads = h.reshape(h.shape[0], self.n, -1)
        return x @ weight.T + bias + torch.einsum("mnr,nrd,nd->md", heads, b, scale)

    def formula_backward(self, dy, weight, h, a, keep):
        return dy @ weight + keep * (h @ a.flatten(0, 1))
