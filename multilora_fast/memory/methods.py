"""A model with branches on it."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from multilora_fast.models import target_linears
from multilora_fast.reference import MultiLoRALinear


def add_branches(
    model: nn.Module,
    target_modules: Iterable[str],
    *,
    r: int,
    lora_num: int,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Freeze ``model`` and put a :class:`MultiLoRALinear` in place of each target; its branches alone train.

    For a model without PEFT. ``dtype`` is the branches' own (None: that of the layer they adapt). Returns the names of
    the replaced layers.

    Raises:
        ValueError: a target that names no nn.Linear of this model.
    """
    names = target_linears(model, target_modules)
    model.requires_grad_(False)
    for name in names:
        base = cast(nn.Linear, model.get_submodule(name))
        layer = MultiLoRALinear(base, r=r, lora_num=lora_num, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_scaling):
            parameter.data = parameter.data.to(dtype or layer.weight.dtype)
        layer.reset_branches()
        model.set_submodule(name, layer)
    return names
