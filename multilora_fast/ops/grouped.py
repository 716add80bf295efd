"""The projections of a mixture of experts, with n LoRA branches per expert.

T tokens, k experts each: S = T·k rows, sorted by expert. K in_features, N out_features, E experts, R = n·r.

    H_e  = x̂_e Ã_eᵀ            shrink        dH_e = dy_e B̃_e                                      shrink
    y_e  = x_e W_eᵀ + H_e B̃_eᵀ expand        dx_e = dy_e W_e + mask/(1−p) ⊙ (dH_e Ã_e)            expand
                                             dÃ_e = dH_eᵀ x̂_e, P_e = dy_eᵀ H_e and from it dB, ds  reduce

No tensor of E·N·K elements is made, and the row counts stay on the device. The dropout mask is keyed by token and
slot, so that it does not depend on the order of an expert's rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from multilora_fast.ops import grouped_torch, selfcheck
from multilora_fast.ops.autograd import once_differentiable
from multilora_fast.ops.backends import Grouped, choose, load_grouped
from multilora_fast.ops.call import no_autocast
from multilora_fast.ops.checks import check_kind, check_scaling, check_shape
from multilora_fast.ops.equations import OpSettings, per_column
from multilora_fast.ops.functional import seed_for
from multilora_fast.ops.grouped_torch import valueless
from multilora_fast.ops.saved_input import cast
from multilora_fast.validation import check_dropout, check_scaling_factor

_CHUNK = 1024  # tokens whose rows are added up at once


def route(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the places token·k + slot of (T, k) expert indices by expert: ``perm`` (S,), the place of each sorted row,
    ascending within an expert, and ``ends`` (E,), int32, the end of each expert's rows."""
    experts, perm = torch.sort(top_k_index.reshape(-1), stable=True)
    each = torch.arange(num_experts, device=experts.device, dtype=experts.dtype)
    return perm, torch.searchsorted(experts, each, right=True).to(torch.int32)


@torch.compiler.disable
def multilora_grouped(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    lora_scaling: Tensor | None,
    perm: Tensor,
    ends: Tensor,
    *,
    top_k: int | None = None,
    y: Tensor | None = None,
    transposed: bool = False,
    scaling_factor: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:
    """One projection of all experts: x_e W_eᵀ + Σᵢ scaling_factor·sᵢ ⊙ Bᵢ Aᵢ dropout(x_e) over the rows of expert e.

    Args:
        x: (S, K), sorted by expert, or with ``top_k`` the tokens (T, K), which are gathered.
        weight: (E, N, K), frozen, or (E, K, N) if ``transposed``; None to add the branches to a copy of ``y`` (S, N).
        lora_A, lora_B, lora_scaling: (E, n, r, K), (E, n, N, r) and (E, n, N) or (E, n, 1), or all None.
        perm, ends: from :func:`route`. Rows past ``ends[-1]`` get no branches.
        dropout_p: probability in [0, 1) of dropping an element of a row before A, one mask for all branches.

    Other arguments as in :func:`multilora_fast.multilora_linear`. No double backward. torch.compile breaks its graph
    here.

    Returns: (S, N), in the weight's dtype, to which x is cast.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree, a weight that wants a gradient, dropout_p outside
            [0, 1), a backend that cannot run.
    """
    check_scaling_factor(scaling_factor)
    check_dropout("dropout_p", dropout_p)
    _check(x, weight, lora_A, lora_B, lora_scaling, perm, ends, top_k, y, transposed)
    base = weight if weight is not None else y
    dtype = x.dtype if base is None else base.dtype
    p = float(dropout_p) if training and lora_A is not None else 0.0
    settings = OpSettings(scaling_factor, p, dtype, choose(backend, x.device, dtype))
    seed = seed_for(settings, seed, x)
    return _Function.apply(x, y, weight, lora_A, lora_B, lora_scaling, seed, perm, ends, top_k, transposed, settings)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, lora_A, lora_B, lora_scaling, seed, perm, ends, top_k, transposed, settings):
        c, p, dtype = settings[:3]
        ops = _products(x, lora_A, settings)
        ctx.settings, ctx.top_k, ctx.transposed = settings, top_k, transposed
        needs_x, ctx.needs_y, _, needs_A, *needs_B = ctx.needs_input_grad[:6]
        H = None
        with no_autocast(x.device.type):
            rows = cast(x, dtype)
            rows = rows if top_k is None else rows[perm // top_k]
            out = product(rows, weight, ends, transposed) if y is None else y.clone()
            if lora_A is not None:
                w = lora_B.transpose(2, 3)
                mask = ops.draw(seed, *rows.shape, p, dtype)
                H = ops.shrink(rows, lora_A, ends, ids=perm, bits=mask, p=p)
                ops.expand(out, H, w, ends, per_column(lora_scaling, w), c)
        ctx.needs = needs_x, needs_A, any(needs_B)
        kept_x, kept_H = x if needs_A else None, H if any(needs_B) else None
        ctx.tokens = len(x)
        ctx.save_for_backward(kept_x, kept_H, weight, lora_A, lora_B, lora_scaling, seed, perm, ends)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, H, weight, lora_A, lora_B, lora_scaling, seed, perm, ends = ctx.saved_tensors
        c, p, dtype = ctx.settings[:3]
        ops, (needs_x, needs_A, needs_B) = _products(dy, lora_A, ctx.settings), ctx.needs
        dx = dA = dB = ds = dH = mask = None
        with no_autocast(dy.device.type):
            rows = cast(dy, dtype).contiguous()
            if lora_A is not None:
                w = lora_B.transpose(2, 3)
                scale = per_column(lora_scaling, w)
                if needs_x or needs_A:
                    dH = ops.shrink(rows, w, ends, scale, c)
                    mask = ops.draw(seed, len(rows), lora_A.shape[3], p, dtype)
                if needs_A:
                    index = None if ctx.top_k is None else perm // ctx.top_k
                    dA = ops.reduce(dH, cast(x, dtype), ends, lora_A.shape[1], lora_A.dtype, index, perm, mask, p)
                if needs_B:
                    dB, ds = ops.reduce_scaled(H, rows, w, ends, scale, c)
                    ds = cast(ds if lora_scaling.shape == scale.shape else ds.sum(2, keepdim=True), lora_scaling.dtype)
            if needs_x:
                if weight is None:
                    dx = rows.new_zeros(len(rows), lora_A.shape[3])
                else:
                    dx = product(rows, weight, ends, not ctx.transposed)
                if dH is not None:
                    ops.expand(dx, dH, lora_A, ends, None, 1.0, perm, mask, p)
                if ctx.top_k is not None:
                    dx = add_slots(dx, perm, ctx.tokens)
        return dx, dy if ctx.needs_y else None, None, dA, dB, ds, *[None] * 6


def product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """x_e (S, K) W_eᵀ, or x_e W_e if ``transposed``, by torch's grouped_mm, or expert by expert where it refuses."""
    if not transposed:
        weight = weight.transpose(1, 2)
    if _is_served(x, weight):
        return F.grouped_mm(x, weight, offs=ends)
    out = x.new_zeros(len(x), weight.shape[2])
    for e, rows in grouped_torch.segments(ends, len(x)):
        torch.mm(x[rows], weight[e], out=out[rows])
    return out


def inverse(perm: Tensor) -> Tensor:
    """The sorted row of each place token·k + slot."""
    return torch.empty_like(perm).scatter_(0, perm, torch.arange(len(perm), device=perm.device))


def add_slots(rows: Tensor, perm: Tensor, tokens: int) -> Tensor:
    """The sum (T, D) of every token's rows of (S, D), in the order of its slots."""
    out = rows.new_empty(tokens, rows.shape[1])
    places = inverse(perm).view(tokens, len(perm) // max(tokens, 1))
    for part, into in zip(places.split(_CHUNK), out.split(_CHUNK), strict=True):
        torch.sum(rows[part], 1, out=into)
    return out


def _is_served(x: Tensor, weight: Tensor) -> bool:
    """Whether grouped_mm takes them: strides that are multiples of 16 bytes, no float64, a GPU of sm_80 or newer."""
    if x.dtype == torch.float64 or (x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)):
        return False
    rows = x.stride(0), weight.stride(0), max(weight.stride()[1:])
    aligned = valueless(x) or not (x.data_ptr() | weight.data_ptr()) % 16
    dense = x.stride(1) == 1 == min(weight.stride()[1:])
    return aligned and dense and not any(stride * x.itemsize % 16 for stride in rows)


def _products(x: Tensor, lora_A: Tensor | None, settings: OpSettings) -> Grouped:
    """The backend's products; on a GPU after the self-check of its kernels."""
    if settings.backend == "triton" and x.is_cuda and lora_A is not None:
        selfcheck.check_grouped(x, lora_A.shape[1], lora_A.shape[2], lora_A.dtype, settings)
    return load_grouped(settings.backend)


def _check(x, weight, lora_A, lora_B, lora_scaling, perm, ends, top_k, y, transposed) -> None:
    E, S = len(ends), len(perm)
    check_shape("x", x, (S // (top_k or 1), "K"), "perm")
    K = x.shape[1]
    if (weight is None) == (y is None):
        raise ValueError("multilora_grouped takes a weight, or y to add the branches to, and not both.")
    if weight is not None:
        check_shape("weight", weight, (E, K, "N") if transposed else (E, "N", K), "x and ends")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("weight must be frozen: the experts' own weights get no gradient here.")
        N = weight.shape[2 if transposed else 1]
    else:
        check_shape("y", y, (S, "N"), "perm")
        N = y.shape[1]
    branches = {"lora_A": lora_A, "lora_B": lora_B, "lora_scaling": lora_scaling}
    missing = [name for name, t in branches.items() if t is None]
    if missing and (weight is None or len(missing) < len(branches)):
        raise ValueError("lora_A, lora_B and lora_scaling must be given together.")
    for name, t in {"weight": weight, "y": y, **branches}.items():
        if t is not None:
            check_kind(name, t, x)
    if not missing:
        check_shape("lora_A", lora_A, (E, "n", "r", K), "x and ends")
        _, n, r, _ = lora_A.shape
        check_shape("lora_B", lora_B, (E, n, N, r), "lora_A")
        check_scaling(lora_scaling, (E, n, N))
