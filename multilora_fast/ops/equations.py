"""The op: y = x Wᵀ + b + Σᵢ c·sᵢ ⊙ Bᵢ Aᵢ dropout(x), forward and backward.

M tokens, K in_features, N out_features, n branches of rank r, R = n·r, c the constant scaling factor. Ã (R, K)
stacks the branches' A, B̃ (N, R) concatenates c·sᵢ ⊙ Bᵢ, x̂ = dropout(x) with one mask.

    H  = x̂ Ãᵀ                 shrink        dH = dy B̃                          shrink
    y  = x Wᵀ + b + H B̃ᵀ      expand        dx = dy W + mask/(1−p) ⊙ (dH Ã)    expand
                                            dÃ = dHᵀ x̂                         reduce
    P = dyᵀ H, dBᵢ = c·sᵢ ⊙ Pᵢ, dsᵢ = c·rowsum(Bᵢ ⊙ Pᵢ)                        reduce, finish

Layers that share an input run as one: their Ã are stacked and their H and dH concatenated, so that shrink and reduce
read x once, and dx is accumulated in place. x is (M, K), dy (M, N), both in the dtype of the products, as are W and b;
y and dx take their leading dimensions from ``shape``. The functions only allocate, make views and call products, so
that a launch plan can record them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multilora_fast.ops import selfcheck
from multilora_fast.ops.backends import Backend, load
from multilora_fast.ops.saved_input import as_tokens, cast


class OpSettings(NamedTuple):
    scaling_factor: float
    dropout_p: float
    dtype: torch.dtype  # of the products: x's, or autocast's
    backend: str
    save_inputs: str = "exact"
    exact_base: bool = False


class GroupSettings(NamedTuple):
    """The settings of layers that share an input, which differ in scaling_factor and exact_base alone."""

    each: tuple[OpSettings, ...]
    widths: tuple[int, ...]  # n·r of each
    one_rank: bool  # whether r is the same for all
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
    x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    lora_scaling: Tensor, seed: Tensor | None, settings: OpSettings, shape: torch.Size,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output (..., N), which is ``y`` with the branches added in place if it is given, and H (M, R)."""
    if y is not None:
        H = _shrink(x, lora_A, seed, settings)
        _expand(as_tokens(y, y.dtype), x, None, None, H, lora_B, lora_scaling, settings)
        return y, H
    c, p, w = settings.scaling_factor, settings.dropout_p, lora_B.transpose(1, 2)
    ops, scale = _products("forward", x, lora_A, settings), per_column(lora_scaling, w)
    mask = ops.draw(seed, *x.shape, p, settings.dtype)
    out = x.new_empty((*shape[:-1], lora_B.shape[1]))
    tokens = as_tokens(out, settings.dtype)
    _check_joint("forward", tokens, x, weight, bias, w, settings)
    H = ops.layer(tokens, x, weight, bias, lora_A, w, scale, c, mask, p, exact=settings.exact_base)
    return out, H


def backward(
    dy: Tensor, x: Tensor | None, H: Tensor | None, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor,
    lora_scaling: Tensor, seed: Tensor | None, settings: OpSettings, needs: Needs, shape: torch.Size,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx (..., K), dÃ as (n, r, K), dB and ds (n, N), each None where it is not needed."""
    layer = [dy], [H], [weight], [lora_B], [lora_scaling], [settings], [needs]
    dx, dA, (dB,), (ds,) = _backward(x, lora_A, seed, shape, *layer)
    return dx, dA, dB, ds


def group_forward(x: Tensor, lora_A: Tensor, seed: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The outputs of layers that share x, and their H concatenated, (M, ΣR).

    ``lora_A`` stacks theirs: (Σn, r, K), or (1, ΣR, K) where r differs. ``rest`` are the weights, biases, lora_B and
    lora_scaling of all layers, a :class:`GroupSettings`, and x's shape. A weight may be a function that returns it.
    """
    *tensors, settings, shape = rest
    weights, biases, lora_Bs, scales = by_kind(tensors, 4)
    H = x.new_empty(len(x), lora_A.shape[0] * lora_A.shape[1])
    _shrink(x, lora_A, seed, settings.each[0], H)
    outs = [x.new_empty((*shape[:-1], lora_B.shape[1])) for lora_B in lora_Bs]
    for out, part, weight, bias, lora_B, lora_scaling, one in zip(
        outs, H.split_with_sizes(settings.widths, 1), weights, biases, lora_Bs, scales, settings.each, strict=True
    ):
        weight = cast(weight(), settings.dtype) if callable(weight) else weight
        _expand(as_tokens(out, settings.dtype), x, weight, bias, part, lora_B, lora_scaling, one)
    return *outs, H


def group_backward(*inputs: Any) -> tuple[Tensor | None, ...]:
    """dx (..., K), accumulated in place, dÃ, every dB and every ds.

    ``inputs`` are the dy (M, N) of the layers that have one, x, their ``lora_A`` as in forward, the seed, the H of all
    layers, then the weights, lora_B and lora_scaling of those with a dy, the group's settings, the indices of these
    layers, their needs, and the shape of dy.
    """
    *tensors, settings, present, needs, shape = inputs
    m = len(present)
    dys, (x, lora_A, seed, H) = tensors[:m], tensors[m : m + 4]
    Hs = [None] * m if H is None else [H.split_with_sizes(settings.widths, 1)[i] for i in present]
    each = [settings.each[i] for i in present]
    weights, lora_Bs, scales = by_kind(tensors[m + 4 :], 3)
    dx, dA, dBs, dss = _backward(x, lora_A, seed, shape, dys, Hs, weights, lora_Bs, scales, each, needs)
    return dx, dA, *dBs, *dss


def _backward(
    x: Tensor | None, lora_A: Tensor, seed: Tensor | None, shape: torch.Size, dys: Sequence[Tensor],
    Hs: Sequence[Tensor | None], weights: Sequence, lora_Bs: Sequence[Tensor], scales: Sequence[Tensor],
    each: Sequence[OpSettings], needs: Sequence[Needs],
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:  # fmt: skip
    """dx, dÃ, every dB and every ds. The reduces come last, so that the products hide their launches."""
    p, dtype, (n, r, K) = each[0].dropout_p, each[0].dtype, lora_A.shape
    ws = [lora_B.transpose(1, 2) for lora_B in lora_Bs]
    scales = [per_column(lora_scaling, w) for lora_scaling, w in zip(scales, ws, strict=True)]
    for dy, w, one in zip(dys, ws, each, strict=True):
        ops = _products("backward", dy, w, one)
    dx = dA = dH = mask = None
    wants_A = any(need.lora_A for need in needs)
    wants_x = any(need.x for need in needs)
    if wants_x or wants_A:
        dH = dys[0].new_empty(len(dys[0]), n * r)
        slices = dH.split([w.shape[0] * w.shape[1] for w in ws], dim=1)
        for dy, w, scale, one, out in zip(dys, ws, scales, each, slices, strict=True):
            ops.shrink(dy, w, scale, one.scaling_factor, out=out)
        mask = ops.draw(seed, len(dH), K, p, dtype)
    if wants_x:
        dx = dys[0].new_empty((*shape[:-1], K))
        target, exact = as_tokens(dx, dtype), each[0].exact_base
        for i, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            weight = cast(weight(), dtype) if callable(weight) else weight
            if i > 0:
                ops.multiply(target, dy, weight)
            elif weight is None:
                ops.expand(target, dH, lora_A, None, 1.0, mask, p, accumulate=False)
            else:
                _check_joint("backward", target, dy, weight, None, lora_A, each[0])
                ops.linear(target, dy, weight, None, dH, lora_A, None, 1.0, mask, p, transposed=False, exact=exact)
    wanted = [need.lora_B or need.lora_scaling for need in needs]
    if wants_A and wanted == [True]:
        c = each[0].scaling_factor
        dB, ds, dA = ops.reduce_all(Hs[0], dys[0], ws[0], scales[0], c, dH, x, lora_A.dtype, mask, p)
        return dx, dA, [dB], [ds]
    if wants_A:
        dA = ops.reduce(dH, x, n, lora_A.dtype, mask, p)
    pairs = [
        ops.reduce_scaled(H, dy, w, scale, one.scaling_factor) if want else (None, None)
        for H, dy, w, scale, one, want in zip(Hs, dys, ws, scales, each, wanted, strict=True)
    ]
    dBs, dss = zip(*pairs, strict=True)
    return dx, dA, dBs, dss


def by_kind(tensors: Sequence, kinds: int) -> list[Sequence]:
    """Split the tensors of a group's layers, ordered kind after kind, into one sequence per kind."""
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
    ops, scale = _products("forward", H, w, settings), per_column(lora_scaling, w)
    if weight is None:
        ops.expand(out, H, w, scale, c)
    else:
        _check_joint("forward", out, x, weight, bias, w, settings)
        ops.linear(out, x, weight, bias, H, w, scale, c, None, 0.0, transposed=True, exact=settings.exact_base)


def _products(direction: str, tokens: Tensor, w: Tensor, settings: OpSettings) -> Backend:
    """The backend's products; on a GPU after the self-check of its kernels."""
    if _is_checked(tokens, settings):
        selfcheck.check(direction, tokens, w, settings)
    return load(settings.backend)


def _check_joint(direction: str, y: Tensor, x: Tensor, weight, bias: Tensor | None, w: Tensor, settings) -> None:
    """On a GPU the self-check of the joint kernel, where it computes the base product."""
    if _is_checked(x, settings):
        selfcheck.check_joint(direction, y, x, weight, bias, w, settings)


def _is_checked(tokens: Tensor, settings: OpSettings) -> bool:
    return settings.backend == "triton" and tokens.is_cuda


def per_column(lora_scaling: Tensor, w: Tensor) -> Tensor:
    """The scale of each column of w (…, n, r, N), (…, n, N)."""
    return lora_scaling.expand(*w.shape[:-2], w.shape[-1])
