"""Which modules a MultiLoRA adapter leaves out or refuses, where PEFT's LoRA differs."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from multilora_fast.peft.experts import is_experts, projections

# Names in checkpoints of the projections that transformers keeps as one parameter for all experts.
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class Bypassed(ValueError):
    """The model never calls this module, so no adapter on it would learn."""


def is_all_linear(config: Any) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def unmatched(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The ``names`` that are the end of no module's name."""
    modules = [f".{name}" for name, _ in model.named_modules()]
    return sorted(name for name in names if not any(module.endswith(f".{name}") for module in modules))


def linear_kinds(model: nn.Module) -> str:
    """The last parts of the linear layers' names, in order."""
    linear = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def in_attention(module: nn.Module) -> bool:
    """Whether this is the out_proj of an nn.MultiheadAttention, which reads its weight and never calls it."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def choose_all_linear(config: Any, model: nn.Module) -> None:
    """Replace "all-linear" in ``config.target_modules`` by names; warn of layers left out that would not learn."""
    _maybe_include_all_linear_layers(config, model)
    linear = config.target_modules
    unused = sorted(name for name in linear if in_attention(model.get_submodule(name)))
    config.target_modules = linear - set(unused)
    asked = [name for name in unused if not _excluded(config, name)]
    if asked:
        warnings.warn(
            f"all-linear leaves out {', '.join(asked)}: an nn.MultiheadAttention reads its weight and not its output.",
            stacklevel=2,
        )


def choose_parameters(wanted: Collection[str], model: nn.Module) -> dict[str, tuple[str, str, str]]:
    """The parameters of ``model`` whose names are in ``wanted`` or end in one of them: by full name, the module's path,
    the parameter's own name, and the wanted name.

    Raises:
        ValueError: a match that is neither a projection of experts that transformers can run by a grouped product, nor
            the weight of a linear layer.
    """
    found = {}
    for path, module in model.named_modules():
        path = path.removesuffix(".base_layer")  # wrapped by another adapter
        for name, _ in module.named_parameters(recurse=False):
            key = f"{path}.{name}"
            target = next((one for one in sorted(wanted) if key == one or key.endswith(f".{one}")), None)
            if target is None:
                continue
            linear = isinstance(module, nn.Linear) and name == "weight"
            if not linear and not (is_experts(module) and name in projections(module)):
                raise ValueError(
                    f"target_parameters names {key} of a {type(module).__name__}, which is not supported: MultiLoRA "
                    "adapts the projections of experts that transformers runs by its experts implementations."
                )
            found[key] = (path, name, target)
    return found


def check_parallel(model: Any, module: Any) -> None:
    """Raise a ValueError for a ``module`` of ``model`` whose weights are spread over devices."""
    if getattr(module, "_is_expert_parallel", False) or (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            "MultiLoRA does not support expert or tensor parallelism: load the model without a tp_plan and without "
            "enable_expert_parallel."
        )


def warn_of_experts(config: Any, model: nn.Module, adapted: Collection[str], *, everything: bool) -> None:
    """Warn of experts and routers that ``target_modules`` (or ``everything``, all-linear) covers and that are not
    ``adapted``. LoRA may adapt these parameters; MultiLoRA does only if target_parameters names them."""
    left = {}
    for path, module in model.named_modules():
        kind, path = type(module).__name__.lower(), path.removesuffix(".base_layer")
        expert = "expert" in kind
        if isinstance(module, nn.Linear) or not (expert or (everything and kind.endswith("router"))):
            continue
        own = {n: p for n, p in module.named_parameters(recurse=False) if f"{path}.{n}" not in adapted}
        names = [f"{path}.{name}" for name in (*own, *_PROJECTIONS)]
        if not _excluded(config, path) and (everything or any(check_target_module_exists(config, n) for n in names)):
            left.update({id(p): (f"{path.rpartition('.')[2]}.{name}", p.numel()) for name, p in own.items()})
    if left:
        shown = ", ".join(sorted({name for name, _ in left.values()}))
        warnings.warn(
            f"{sum(size for _, size in left.values()):,} parameters of experts and routers are not adapted, {shown}: "
            "they are in no linear layers, and only target_parameters adapts experts.",
            stacklevel=2,
        )


def _excluded(config: Any, name: str) -> bool:
    every = replace(config, target_modules=".*", layers_to_transform=None, layers_pattern=None)
    return not check_target_module_exists(every, name)
