"""The kernels' formulas in torch, inputs for them, and the 2× rule that compares: ‖error‖ ≤ 2·‖error of torch in that
dtype‖ + eps·‖the formula on absolute values‖."""

import math

import torch
from device import DEVICE

from multilora_fast.kernels.dropout import draw, drop_threshold, dropout_mask

ALPHA = 1 / 3
P = 0.3


def outputs_of_nan(monkeypatch):
    """What is allocated is full of NaN, so that an element a kernel does not write fails."""
    empty = torch.empty

    def filled(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() and not out.is_meta else out

    monkeypatch.setattr(torch, "empty", filled)


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


def shrunk(x, w, scale, keep):
    return torch.einsum("md,nrd,nd->mnr", x * keep, w, scale).flatten(1)


def expanded(y, h, w, scale, keep):
    n, r, _ = w.shape
    return y + keep * torch.einsum("mnr,nrd,nd->md", h.reshape(-1, n, r), w, scale)


def reduced(h, x, keep, n):
    return (h.T @ (x * keep)).reshape(n, h.shape[1] // n, x.shape[1])


def reduced_scaled(h, z, w, scale):
    n, r, _ = w.shape
    products = (z.T @ h).reshape(z.shape[1], n, r).permute(1, 0, 2)
    return scale[:, :, None] * products, ALPHA * (w.transpose(1, 2) * products).sum(-1)


def within(got, formula, *inputs, dtype, factors=()):
    """The 2× rule for one output; `factors` are exact numbers, the same in every dtype."""
    truth = formula(*(t.double() for t in inputs), *(f.double() for f in factors))
    plain = formula(*(t.to(dtype) for t in inputs), *(f.to(dtype) for f in factors))
    size = formula(*(t.double().abs() for t in inputs), *(f.double().abs() for f in factors))
    assert got.shape == truth.shape
    error = (got.double() - truth).norm()
    allowed = 2 * (plain.double() - truth).norm() + torch.finfo(dtype).eps * size.norm()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def make(*size, dtype):
    return torch.randn(*size, dtype=torch.float64).to(dtype).to(DEVICE)


def problem(shape, dtype, params, scalar=False):
    M, K, N, n, r = shape
    scale = make(n, 1, dtype=params).expand(n, N) if scalar else make(n, N, dtype=params)
    a, b = make(n, r, K, dtype=params), make(n, N, r, dtype=params)
    x, y, h = (make(M, size, dtype=dtype) for size in (K, N, n * r))
    return x, y, a, b.transpose(1, 2), scale, h


def mask_of(seed, M, D, p):
    """The mask as the kernels take it, and as numbers with 1/(1 − p) in them."""
    keep = dropout_mask(seed_of(seed), M, D, p).double() * 65536 / (65536 - drop_threshold(p))
    return {"bits": draw(seed_of(seed), M, D, p), "p": p}, keep
