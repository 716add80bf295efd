"""The op in PyTorch's own operations, for torch.func's transforms, forward mode and torch.jit.trace."""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from multilora_fast.ops.backends import load
from multilora_fast.ops.equations import OpSettings
from multilora_fast.ops.torch_backend import inverse_keep


def is_seen_through() -> bool:
    """Whether a transform of torch.func, forward-mode differentiation or torch.jit.trace is active."""
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return True
    return forward_ad._current_level >= 0


def composite(x, y, weight, bias, lora_A, lora_B, lora_scaling, seed: Tensor | None, settings: OpSettings) -> Tensor:
    """The output (..., N). Without a ``seed`` the mask is that of :func:`torch.nn.functional.dropout`."""
    c, p, dtype = settings.scaling_factor, settings.dropout_p, settings.dtype
    x = x.to(dtype)
    if y is None:
        weight = weight if isinstance(weight, Tensor) else weight()
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if p > 0.0 and seed is not None:
        keep = load(settings.backend).dropout_mask(seed, math.prod(x.shape[:-1]), x.shape[-1], p)
        x = x * keep.view(x.shape) * inverse_keep(p)
    elif p > 0.0:
        x = F.dropout(x, p)
    a = lora_A.flatten(0, 1).to(dtype)
    b = (c * lora_scaling[..., None] * lora_B).transpose(0, 1).flatten(1).to(dtype)
    return y + (x @ a.t() @ b.t()).to(y.dtype)
