"""Swap a model's MultiLoRALinear modules for the layer on the fused op, and back."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from multilora_fast.layers.fused import FusedMultiLoRALinear
from multilora_fast.layers.shared_input import assign_groups
from multilora_fast.ops.backends import choose
from multilora_fast.ops.checks import check_branches
from multilora_fast.reference import MultiLoRALinear
from multilora_fast.validation import check_save_inputs, check_switch

_PARAMETERS = ("weight", "bias", "lora_A", "lora_B", "lora_scaling")
_ATTRIBUTES = (*_PARAMETERS, "lora_num", "lora_dropout", "scaling_factor")


@dataclass
class FuseReport:
    """What :func:`fuse` did: the names of the modules it swapped, and of those it left, with the reason."""

    swapped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.swapped and not self.left:
            return (
                "fused 0 modules: found no MultiLoRALinear that is not fused yet, nor any module with its attributes "
                f"({', '.join(_ATTRIBUTES)}); a PEFT model of a MultiLoraConfig needs no fuse."
            )
        lines = [f"fused {len(self.swapped)} modules, left {len(self.left)}"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.left.items()])


def fuse(
    model: nn.Module,
    *,
    backend: str | None = None,
    save_inputs: str = "exact",
    share_inputs: bool = True,
    exact_base: bool = False,
) -> FuseReport:
    """Swap every MultiLoRALinear in ``model``, ours or any module with its attributes, for the fused layer, in place.

    The attributes are weight, bias (or None), lora_A, lora_B, lora_scaling, lora_num, lora_dropout and scaling_factor.
    Parameters and state_dict keys stay, so existing optimizers and checkpoints stay valid. A module used in several
    places stays shared. Modules with merged weights, hooks, another formula, or parameters and buffers that the fused
    layer does not have are left alone and reported; so is ``model`` itself.

    With ``share_inputs`` layers that read the same input (q, k, v; gate, up) share one shrink, one saved input and one
    dropout mask in training; results agree up to rounding. ``backend``, ``save_inputs`` and ``exact_base`` as in
    :func:`~multilora_fast.multilora_linear`.

    Raises:
        ValueError: ``model`` is no nn.Module, ``backend`` is not "triton", "torch" or None, ``save_inputs`` not
            "exact" or "fp8", or a switch not True or False.
    """
    check_save_inputs(save_inputs)
    check_switch("exact_base", exact_base)
    check_switch("share_inputs", share_inputs)
    choose(backend, torch.device("meta"))  # checks the name
    report, swapped = FuseReport(), {}
    tried: dict[int, FusedMultiLoRALinear | str] = {}  # by module, what replaces it or why nothing does

    def swap(name: str, module: nn.Module) -> nn.Module | None:
        if not _is_unfused(module):
            return None
        if id(module) not in tried:
            tried[id(module)] = _why_not(module) or _fused(module, backend, save_inputs, exact_base)
        found = tried[id(module)]
        if isinstance(found, str):
            report.left[name] = found
            return None
        swapped[name] = found
        return found

    if _is_unfused(model):
        report.left[""] = "it is the model itself, which has no parent to swap it in: build a FusedMultiLoRALinear"
    _swap_children(model, swap)
    report.swapped += swapped
    if share_inputs:
        assign_groups(swapped)
    return report


def unfuse(model: nn.Module) -> list[str]:
    """Put back the modules that :func:`fuse` replaced, with the current parameters, scaling factor and mode; return
    their names."""
    names: list[str] = []

    def swap(name: str, module: nn.Module) -> nn.Module | None:
        original = module.__dict__.get("_unfused") if isinstance(module, FusedMultiLoRALinear) else None
        if original is None:
            return None
        names.append(name)
        for key in original._parameters:
            original.register_parameter(key, getattr(module, key))
        if original.scaling_factor != module.scaling_factor:
            original.scaling_factor = module.scaling_factor
        if original.training != module.training:
            original.train(module.training)
        return original

    _swap_children(model, swap)
    return names


def _swap_children(model: nn.Module, swap) -> None:
    """Replace each submodule, everywhere it is used, by what ``swap(name, module)`` returns, unless None."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, not {type(model).__name__}.")
    for prefix, parent in list(model.named_modules()):
        for key, child in list(parent._modules.items()):
            if child is not None:
                new = swap(f"{prefix}.{key}" if prefix else key, child)
                if new is not None:
                    parent._modules[key] = new


def _is_unfused(module: nn.Module) -> bool:
    return not isinstance(module, FusedMultiLoRALinear) and all(hasattr(module, key) for key in _ATTRIBUTES)


def _why_not(module: Any) -> str | None:
    """The reason to leave a MultiLoRALinear alone, or None."""
    if getattr(module, "merged", False):
        return "its branches are merged into the weight"
    if extra := {*module._parameters, *module._buffers} - set(_PARAMETERS):
        return f"it holds {', '.join(sorted(extra))}, which the fused layer does not"
    given = [key for key in _PARAMETERS if key != "bias" or module.bias is not None]
    if others := [key for key in given if key not in module._parameters]:
        return f"{', '.join(others)} is not a plain Parameter"
    if any(value for key, value in vars(module).items() if key.endswith("_hooks")):
        return "it has hooks"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if _dropout(module) is None:
        return f"its lora_dropout is a {type(module.lora_dropout).__name__}, not an nn.Dropout"
    K = module.lora_A.shape[-1]
    weight = module.weight.t() if getattr(module, "fan_in_fan_out", False) else module.weight
    try:
        check_branches(module.lora_A.new_empty(0, K), module.lora_A, module.lora_B, module.lora_scaling)
    except ValueError as error:
        return str(error).rstrip(".")
    if tuple(weight.shape) != (module.lora_B.shape[1], K):
        return f"its weight has shape {tuple(weight.shape)}, not ({module.lora_B.shape[1]}, {K})"
    return None if type(module) is MultiLoRALinear else _other_formula(module)


def _dropout(module: Any) -> nn.Dropout | None:
    """The module's dropout, an inactive one for nn.Identity or a plain function, None for another module."""
    dropout = module.lora_dropout
    if type(dropout) is nn.Dropout:
        return dropout
    return None if isinstance(dropout, nn.Module) and not isinstance(dropout, nn.Identity) else nn.Dropout(0.0)


def _fused(module: Any, backend: str | None, save_inputs="exact", exact_base=False) -> FusedMultiLoRALinear:
    """A fused layer on the module's own parameters. It keeps the module for :func:`unfuse`, not as a submodule."""
    fused = FusedMultiLoRALinear.__new__(FusedMultiLoRALinear)
    nn.Module.__init__(fused)
    for key in _PARAMETERS:
        fused.register_parameter(key, getattr(module, key))
    fused.lora_num, fused.r, fused.in_features = module.lora_A.shape
    fused.out_features = module.lora_B.shape[1]
    fused.scaling_factor = module.scaling_factor
    fused.fan_in_fan_out = getattr(module, "fan_in_fan_out", False)
    fused.lora_dropout = cast(nn.Dropout, _dropout(module))
    fused.backend, fused.save_inputs, fused.exact_base = backend, save_inputs, exact_base
    fused.training = module.training
    fused.__dict__["_unfused"] = module
    return fused


@torch.no_grad()
def _other_formula(module: Any) -> str | None:
    """Why a module of another class does not compute MultiLoRA's formula, tried on two tokens, or None."""
    if module.weight.is_meta:
        return "its forward cannot be tried on the meta device"
    fused = _fused(module, "torch")
    random = torch.Generator().manual_seed(0)

    def draw(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=random).to(t)

    x = draw(module.lora_A[:1, :2])
    parameters = {key: draw(getattr(module, key)) for key in ("lora_A", "lora_B", "lora_scaling")}
    dropout = fused.lora_dropout
    training, dropout.training = dropout.training, False
    try:
        theirs, ours = (functional_call(m, parameters, (x,)).double() for m in (module, fused))
    except Exception as error:  # another class's forward may raise anything
        return f"its forward could not be tried ({type(error).__name__}: {error})"
    finally:
        dropout.training = training
    if theirs.shape != ours.shape or not torch.linalg.norm(theirs - ours) <= 0.02 * torch.linalg.norm(ours):
        return "its forward computes another formula than MultiLoRA's"
    return None
