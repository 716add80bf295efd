"""The op: y = x Wᵀ + b + Σᵢ c·sᵢ ⊙ Bᵢ Aᵢ dropout(x), forward and backward.

M tokens, K in_features, N out_features, n branches of rank r, R = n·r, c the constant scaling factor. Ã (R, K) is
the branches' A below each other, B̃ (N, R) the branches' c·sᵢ ⊙ Bᵢ beside each other, x̂ = dropout(x) with one mask.

    H  = x̂ Ãᵀ                 shrink        dH = dy B̃                          shrink
    y  = x Wᵀ + b + H B̃ᵀ      expand        dx = dy W + mask/(1−p) ⊙ (dH Ã)    expand
                                            dÃ = dHᵀ x̂                         reduce
    P = dyᵀ H, dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ)                        reduce, epilogue

Layers that share an input run as one: with all their Ã below each other, and all their H and dH beside each other,
shrink and reduce read x once for all of them, and dx is written once and added to in place. Here x is (M, K), dy
(M, N), both in the dtype of the products, as are W and b. Every function writes the large tensors that it is given,
returns the small ones, and calls nothing but products: its launches can be recorded.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multilora_fast.ops import selfcheck
from multilora_fast.ops.backends import Backend, load


class OpSettings(NamedTuple):
    scaling_factor: float
    dropout_p: float
    dtype: torch.dtype  # of the products: x's, or autocast's
    backend: str
    save_inputs: str = "exact"
    exact_base: bool = False


class GroupSettings(NamedTuple):
    """Of layers that share an input: they agree in all but scaling_factor and exact_base."""

    each: tuple[OpSettings, ...]
    counts: tuple[int, ...]  # n of each
    ranks: tuple[int, ...]  # r of each
    dtype: torch.dtype
    backend: str
    save_inputs: str


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    x: bool
    weight: bool
    bias: bool
    lora_A: bool
    lora_B: bool
    lora_scaling: bool


def forward(
    x: Tensor,
    out: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_scaling: Tensor,
    seed: Tensor | None,
    settings: OpSettings,
) -> tuple[Tensor]:
    """Writes the output, or adds the branches to ``out`` where there is no weight, and returns H (M, R)."""
    if weight is not None:
        c, p, w = settings.scaling_factor, settings.dropout_p, lora_B.transpose(1, 2)
        ops, scale = _products("forward", x, lora_A, settings), _per_column(lora_scaling, w)
        mask = ops.draw(seed, *x.shape, p, settings.dtype)
        return (ops.layer(out, x, weight, bias, lora_A, w, scale, c, mask, p, exact=settings.exact_base),)
    H = _shrink(x, lora_A, seed, settings)
    _expand(out, x, None, None, H, lora_B, lora_scaling, settings)
    return (H,)


def backward(
    dy: Tensor,
    x: Tensor | None,
    H: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_scaling: Tensor,
    seed: Tensor | None,
    dx: Tensor | None,
    settings: OpSettings,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Writes ``dx`` (M, K), and returns dÃ as (n, r, K), dB and ds (n, N), None where ``needs`` says so.

    The reduces come last: the product hides their launches.
    """
    c, p, dtype = settings.scaling_factor, settings.dropout_p, settings.dtype
    n, _, K = lora_A.shape
    w = lora_B.transpose(1, 2)
    ops, scale = _products("backward", dy, w, settings), _per_column(lora_scaling, w)
    dA = dB = ds = dH = mask = None
    if needs.x or needs.lora_A:
        dH = ops.shrink(dy, w, scale, c)
        mask = ops.draw(seed, dy.shape[0], K, p, dtype)
    if dx is not None and weight is None:
        ops.expand(dx, dH, lora_A, None, 1.0, mask, p, accumulate=False)
    elif dx is not None:
        exact = settings.exact_base
        ops.linear(dx, dy, weight, None, dH, lora_A, None, 1.0, mask, p, transposed=False, exact=exact)
    if needs.lora_A and (needs.lora_B or needs.lora_scaling):
        dB, ds, dA = ops.reduce_all(H, dy, w, scale, c, dH, x, lora_A.dtype, mask, p)
    elif needs.lora_A:
        dA = ops.reduce(dH, x, n, lora_A.dtype, mask, p)
    elif needs.lora_B or needs.lora_scaling:
        dB, ds = ops.reduce_scaled(H, dy, w, scale, c)
    return dA, dB, ds


def group_forward(x: Tensor, lora_A: Tensor, seed: Tensor | None, *rest: Any) -> tuple[()]:
    """Writes the outputs of layers that share x, and their H beside each other.

    ``lora_A`` (Σn, r, K), or (1, ΣR, K) where they have several r, is theirs below each other. ``rest`` are the
    outputs, the H as slices of one (M, ΣR), the weights, the biases, the lora_B and the lora_scaling of all layers, and
    last a :class:`GroupSettings`. A weight may be a function that returns it.
    """
    *tensors, settings = rest
    outs, Hs, weights, biases, lora_Bs, scales = by_kind(tensors, 6)
    R = lora_A.shape[0] * lora_A.shape[1]
    _shrink(x, lora_A, seed, settings.each[0], Hs[0].as_strided((len(x), R), (R, 1)))
    for out, H, weight, bias, lora_B, lora_scaling, one in zip(
        outs, Hs, weights, biases, lora_Bs, scales, settings.each, strict=True
    ):
        _expand(out, x, weight() if callable(weight) else weight, bias, H, lora_B, lora_scaling, one)
    return ()


def group_backward(*inputs: Any) -> tuple[Tensor | None, ...]:
    """Writes ``dx`` (M, K) once and adds to it in place, and returns dÃ, every dB and every ds.

    ``inputs`` are the dy (M, N) of the layers that have one, x, their ``lora_A`` as forward, the seed and dx, then
    their H, weights, lora_B and lora_scaling, the group's settings, which layers these are, and their needs.
    """
    *tensors, settings, present, needs = inputs
    m = len(present)
    dys, (x, lora_A, seed, dx) = tensors[:m], tensors[m : m + 4]
    Hs, weights, lora_Bs, scales = by_kind(tensors[m + 4 :], 4)
    each = [settings.each[i] for i in present]
    p, dtype, (n, r, K) = each[0].dropout_p, each[0].dtype, lora_A.shape
    ws = [lora_B.transpose(1, 2) for lora_B in lora_Bs]
    scales = [_per_column(lora_scaling, w) for lora_scaling, w in zip(scales, ws, strict=True)]
    for dy, w, one in zip(dys, ws, each, strict=True):
        ops = _products("backward", dy, w, one)
    dA = dH = mask = None
    wants_A = any(need.lora_A for need in needs)
    if dx is not None or wants_A:
        dH = dys[0].new_empty(len(dys[0]), n * r)
        slices = dH.split([w.shape[0] * w.shape[1] for w in ws], dim=1)
        for dy, w, scale, one, out in zip(dys, ws, scales, each, slices, strict=True):
            ops.shrink(dy, w, scale, one.scaling_factor, out=out)
        mask = ops.draw(seed, len(dH), K, p, dtype)
    if dx is not None:
        for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            weight = weight() if callable(weight) else weight
            if i == 0:
                exact = each[0].exact_base
                ops.linear(dx, dy, weight, None, dH, lora_A, None, 1.0, mask, p, transposed=False, exact=exact)
            else:
                ops.multiply(dx, dy, weight)
    if wants_A:
        dA = ops.reduce(dH, x, n, lora_A.dtype, mask, p)
    pairs = [
        ops.reduce_scaled(H, dy, w, scale, one.scaling_factor) if need.lora_B or need.lora_scaling else (None, None)
        for H, dy, w, scale, one, need in zip(Hs, dys, ws, scales, each, needs, strict=True)
    ]
    return dA, *(dB for dB, _ in pairs), *(ds for _, ds in pairs)


def by_kind(tensors: Sequence, kinds: int) -> list[Sequence]:
    """The tensors of all layers of a group, which lie kind after kind, one sequence for each kind."""
    count = len(tensors) // kinds
    return [tensors[i : i + count] for i in range(0, kinds * count, count)]


def _shrink(x: Tensor, lora_A: Tensor, seed: Tensor | None, settings: OpSettings, out: Tensor | None = None) -> Tensor:
    p, dtype = settings.dropout_p, settings.dtype
    ops = _products("forward", x, lora_A, settings)
    return ops.shrink(x, lora_A, None, 1.0, ops.draw(seed, *x.shape, p, dtype), p, out=out)


def _expand(
    out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, H: Tensor, lora_B: Tensor,
    lora_scaling: Tensor, settings: OpSettings,
) -> None:  # fmt: skip
    c, w = settings.scaling_factor, lora_B.transpose(1, 2)
    ops, scale = _products("forward", H, w, settings), _per_column(lora_scaling, w)
    if weight is None:
        ops.expand(out, H, w, scale, c)
    else:
        ops.linear(out, x, weight, bias, H, w, scale, c, None, 0.0, transposed=True, exact=settings.exact_base)


def _products(direction: str, tokens: Tensor, w: Tensor, settings: OpSettings) -> Backend:
    """The backend's products; on a GPU the kernels are tried once before they are trusted."""
    if settings.backend == "triton" and tokens.is_cuda:
        selfcheck.check(direction, tokens, w, settings)
    return load(settings.backend)


def _per_column(lora_scaling: Tensor, w: Tensor) -> Tensor:
    return lora_scaling.expand(w.shape[0], w.shape[2])
