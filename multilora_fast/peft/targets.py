"""What a MultiLoRA adapter leaves out or refuses where PEFT's LoRA goes another way."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn

# As checkpoints name the projections that transformers keeps as one parameter for all experts.
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Their kernels read the weights of these layers and not their outputs, so PEFT refuses them for LoRA.
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_MAMBA_LAYERS = ("out_proj", "conv1d")


def is_all_linear(config: Any) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def in_attention(module: nn.Module) -> bool:
    """Whether this is the out_proj of an nn.MultiheadAttention, which reads its weight and never calls it."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def choose_all_linear(config: Any, model: nn.Module) -> None:
    """Name in ``config.target_modules`` the layers that "all-linear" stands for, with a warning of those that can learn
    nothing there."""
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


def check_mamba(model: nn.Module, name: str) -> None:
    """Raise a ValueError if the module called ``name`` is one that Mamba's kernels pass by."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _MAMBA and name in _MAMBA_LAYERS:
        raise ValueError(
            f"Target module {name} is incompatible with Mamba-based models (model_type={kind!r}), whose kernels read "
            "its weight and not its output: leave it out with exclude_modules."
        )


def warn_of_experts(config: Any, model: nn.Module, *, everything: bool) -> None:
    """Warn of experts and routers that are no linear layers, though the config names them, or ``everything``: LoRA may
    adapt these parameters, MultiLoRA does not."""
    left = {}
    for path, module in model.named_modules():
        kind = type(module).__name__.lower()
        expert = "expert" in kind
        if isinstance(module, nn.Linear) or not (expert or (everything and kind.endswith("router"))):
            continue
        own = dict(module.named_parameters(recurse=False))
        names = [f"{path}.{name}" for name in (*own, *_PROJECTIONS)]
        if not _excluded(config, path) and (everything or any(check_target_module_exists(config, n) for n in names)):
            left.update({id(parameter): parameter.numel() for parameter in own.values()})
    if left:
        warnings.warn(
            f"{sum(left.values()):,} parameters of experts and routers are not adapted: they are in no linear layers.",
            stacklevel=2,
        )


def _excluded(config: Any, name: str) -> bool:
    every = replace(config, target_modules=".*", layers_to_transform=None, layers_pattern=None)
    return not check_target_module_exists(every, name)
