"""Adapt a causal LM by each method: full fine-tuning, PEFT's LoRA, the reference loop, and ours."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, cast

from torch import nn

from multilora_fast.models import shallow_copy
from multilora_fast.reference import MultiLoRALinear

FULL, LORA, REFERENCE, OURS = METHODS = ("full fine-tuning", "PEFT LoRA", "reference loop", "ours")


class CannotPlan(ValueError):
    """The method cannot adapt the modules, or its step depends on the values of tensors; the message says why."""


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
    """Adapt ``model`` in place as ``method``, one of METHODS, trains it. FULL leaves it as it is.

    All methods adapt the modules that OURS adapts for ``targets`` and ``options`` (further fields of MultiLoraConfig).
    Adapters have the dtype of their layers, the total rank lora_num·r, and the factor lora_alpha / r (1 for None).
    ``loop`` is the class of the loop's layers.

    Raises:
        Bypassed: modules that their model never calls.
        CannotPlan: modules that PEFT's LoRA cannot adapt without others, or the loop at all.
        ValueError: targets that match nothing, or that are no linear layers.
    """
    from peft import get_peft_model  # imported lazily: most importers need only the names above

    from multilora_fast.peft import MultiLoraConfig
    from multilora_fast.peft.layer import named_layers

    if method == FULL:
        return model
    options["target_modules"] = targets if isinstance(targets, str) else list(targets)
    ours = MultiLoraConfig(r=r, lora_num=lora_num, lora_alpha=lora_alpha, lora_dropout=lora_dropout, **options)
    if method == LORA:
        # Its layers are on the meta device, and draw no random numbers.
        example = get_peft_model(cast(Any, shallow_copy(model)), ours, low_cpu_mem_usage=True)
        layers = dict(named_layers(example.get_base_model()))
        return _as_lora(model, layers, {**options, "lora_dropout": lora_dropout})
    adapted = get_peft_model(cast(Any, model), ours, autocast_adapter_dtype=False)
    if method == OURS:
        return adapted
    base = adapted.get_base_model()
    for name, layer in named_layers(base):
        base.set_submodule(name, _as_loop(name, layer, loop, ours))
    return base


def _as_lora(model: Any, layers: dict[str, Any], options: dict[str, Any]) -> Any:
    """``model`` with PEFT's LoRA in place of the MultiLoRA ``layers``, at equal total ranks. Experts are named by their
    parameters."""
    from peft import LoraConfig, get_peft_model

    ranks, alphas, experts = {}, {}, []
    for name, layer in layers.items():
        (branches,) = layer.multilora_branches.values()
        ranks[name] = branches.lora_A.shape[-3] * branches.lora_A.shape[-2]
        alphas[name] = branches.scaling_factor * ranks[name]
        experts += [name] if branches.lora_A.dim() == 4 else []
    (r, _), *_ = Counter(ranks.values()).most_common()
    alpha: Any = next(alphas[name] for name in ranks if ranks[name] == r)  # PEFT's type is int, but any will do
    known = {field.name for field in fields(LoraConfig)}
    options = {name: value for name, value in options.items() if name in known and name not in _CHOICES}
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=[name for name in ranks if name not in experts],
        target_parameters=experts or None,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={re.escape(name): own for name, own in alphas.items() if own != alpha},
        **options,
    )
    try:
        adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
        tuner = adapted.base_model
        others = ", ".join(sorted({*tuner.targeted_module_names, *tuner.targeted_parameter_names} ^ set(ranks))[:2])
        reason = f"{others} would be adapted by one of {LORA} and {OURS} alone." if others else ""
    except ValueError as error:
        reason = str(error)
    rewritten: Any = set(config.target_parameters or ()) - set(experts)
    if reason and rewritten:
        reason = (
            "PEFT turns the names of this model's dense MLPs into parameters of its experts "
            f"({', '.join(sorted(rewritten))}): leave them out with exclude_modules."
        )
    if reason:
        raise CannotPlan(reason)
    return adapted


# The options that choose modules and ranks.
_CHOICES = {
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern",
}  # fmt: skip


def _as_loop(name: str, layer: Any, loop: type[MultiLoRALinear], config: Any) -> MultiLoRALinear:
    """The loop in place of a MultiLoRA layer. It refuses a Conv1D or a subclass of nn.Linear, and gets a plain one."""
    (branches,) = layer.multilora_branches.values()
    if branches.lora_A.dim() == 4:
        raise CannotPlan(f"the loop adapts linear layers, and {name} is a parameter of experts.")
    n, r, _ = branches.lora_A.shape
    base = layer.base_layer
    if type(base) is not nn.Linear and type(base.weight) is nn.Parameter:
        weight = base.weight if isinstance(base, nn.Linear) else nn.Parameter(base.weight.t(), requires_grad=False)
        N, K = weight.shape
        linear = nn.Linear(K, N, device="meta")
        linear.weight, linear.bias = weight, base.bias
        base = linear
    alpha = branches.scaling_factor * r
    return loop(base, r=r, lora_num=n, lora_alpha=alpha, lora_dropout=config.lora_dropout, scaling=config.scaling)


def draw_scales(model: nn.Module) -> None:
    """Draw every scale, as if trained: no gradient reaches A and B through zero scales."""
    for name, parameter in model.named_parameters():
        if name.endswith("lora_scaling"):
            nn.init.normal_(parameter, std=0.1)
