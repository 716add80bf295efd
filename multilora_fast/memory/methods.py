"""One causal LM by each way to train it: whole, with PEFT's LoRA, with the loop over branches, and with ours."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from multilora_fast.models import target_linears
from multilora_fast.reference import MultiLoRALinear

FULL, LORA, REFERENCE, OURS = METHODS = ("full fine-tuning", "PEFT LoRA", "reference loop", "ours")


def adapt(
    model: nn.Module,
    method: str,
    targets: Iterable[str] | str,
    *,
    r: int,
    lora_num: int,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    loop: type[MultiLoRALinear] = MultiLoRALinear,
    **options: Any,
) -> Any:
    """``model`` as ``method``, one of METHODS, trains it, adapted in place; FULL leaves it as it is.

    Adapters are in the dtype of the layers they adapt, of total rank lora_num·r and multiplied by lora_alpha / r, of
    which None makes 1. ``targets`` and ``options``, further fields of the adapter's config, are PEFT's for all methods:
    the loop takes what OURS would, and of the options ``scaling``. ``loop`` is the class of its layers.

    Raises:
        ValueError: targets that match nothing, or that the method cannot adapt.
    """
    from peft import LoraConfig, get_peft_model  # heavy, and many want the names alone

    from multilora_fast.peft import MultiLoraConfig

    if method == FULL:
        return model
    branches: dict[str, Any] = {"r": r, "lora_num": lora_num, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    options["target_modules"] = targets if isinstance(targets, str) else list(targets)
    if method == LORA:
        alpha: Any = lora_num * (r if lora_alpha is None else lora_alpha)  # PEFT's type is int, but any will do
        config: Any = LoraConfig(r=lora_num * r, lora_alpha=alpha, lora_dropout=lora_dropout, **options)
    else:
        config = MultiLoraConfig(**branches, **options)
    adapted = get_peft_model(cast(Any, model), config, autocast_adapter_dtype=False)
    return _as_loops(adapted, loop, scaling=config.scaling, **branches) if method == REFERENCE else adapted


def _as_loops(adapted: Any, loop: type[MultiLoRALinear], **branches: Any) -> nn.Module:
    """The model under PEFT's wrapper, with a loop in place of every layer of ours."""
    from multilora_fast.peft import MultiLoraLinear

    model = adapted.get_base_model()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, MultiLoraLinear):
            model.set_submodule(name, loop(_as_linear(layer.base_layer), **branches))
    return model


def _as_linear(base: Any) -> nn.Linear:
    """``base``, or the nn.Linear of the same function where it is a Conv1D, which the loop has no form of."""
    if isinstance(base, nn.Linear):
        return base
    K, N = base.weight.shape
    linear = nn.Linear(K, N, device="meta")
    linear.weight, linear.bias = nn.Parameter(base.weight.t(), requires_grad=False), base.bias
    return linear


def draw_scales(model: nn.Module) -> None:
    """Give every branch a scale as after training: from zero ones no gradient reaches A and B."""
    for name, parameter in model.named_parameters():
        if name.endswith("lora_scaling"):
            nn.init.normal_(parameter, std=0.1)


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
