"""The PEFT tuner: puts MultiLoRA layers into a model, and implements what PEFT leaves to each method."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from peft.tuners.lora.model import _adapter_names_pre_forward_hook
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper, _get_submodules
from torch import nn
from transformers.pytorch_utils import Conv1D

from multilora_fast.adapters.branches import CONTAINER, NAMES, Branches, stack
from multilora_fast.adapters.config import describe, pattern_value, targets
from multilora_fast.adapters.files import model_type
from multilora_fast.layers.shared_input import assign_groups
from multilora_fast.peft.config import MultiLoraConfig
from multilora_fast.peft.experts import MultiLoraExperts, MultiLoraProjection, experts_per_token
from multilora_fast.peft.layer import MultiLoraLayer, MultiLoraLinear, named_layers
from multilora_fast.peft.precision import warn_of_half_scales
from multilora_fast.peft.quantization import backend_of, get_quantization_kwargs
from multilora_fast.peft.targets import (
    Bypassed,
    check_parallel,
    choose_all_linear,
    choose_parameters,
    in_attention,
    is_all_linear,
    unmatched,
    warn_of_experts,
)


class MultiLoraModel(BaseTuner):
    """A model with MultiLoRA layers, the ``.base_model`` of what ``get_peft_model`` returns.

    ``targeted_module_names`` lists the adapted modules. Names in ``target_modules`` that match no module raise a
    warning, or if none matches PEFT's NoMatchingPeftModuleError, a ValueError.
    """

    prefix: str = "multilora_"
    tuner_layer_cls = MultiLoraLayer
    _checked_scales = False
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_check_loaded)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        config = self.peft_config[adapter_name]
        all_linear = is_all_linear(config)
        if all_linear:
            choose_all_linear(config, model)
        with warnings.catch_warnings():
            # PEFT matches the keys of these patterns with modules only, not with target_parameters.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.base_model_type = model_type(model)
        if not isinstance(config.target_modules, str):
            idle = unmatched(model, config.target_modules)
            if idle:
                warnings.warn(f"target_modules {', '.join(idle)} match no module of the model.", stacklevel=2)
        adapted = {n: layer for n, layer in named_layers(model) if adapter_name in layer.multilora_branches}
        if not config.inference_mode:
            warn_of_experts(config, model, adapted, everything=all_linear)
        for field in ("rank_pattern", "alpha_pattern", "lora_num_pattern"):
            keys = getattr(config, field)
            idle = [key for key in keys if not any(pattern_value({key: True}, name, False) for name in adapted)]
            if idle:
                warnings.warn(f"{field} {', '.join(sorted(idle))} matches no adapted module.", stacklevel=2)
        if config.share_inputs:
            assign_groups({name: layer.multilora_branches[adapter_name] for name, layer in adapted.items()
                           if isinstance(layer, MultiLoraLinear)})  # fmt: skip

    def _prepare_adapter_config(self, peft_config, model_config):
        unknown = model_config["model_type"] not in self.target_module_mapping
        if peft_config.target_modules is None and unknown and peft_config.target_parameters:
            return peft_config  # adapts target_parameters only
        return super()._prepare_adapter_config(peft_config, model_config)

    def _inject_parameters(  # type: ignore[override]  # PEFT's own differs by version
        self, peft_config: MultiLoraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool = False, **_
    ) -> list[str]:
        """Adapt the ``target_parameters``: projections of experts, and weights of linear layers."""
        found = choose_parameters(peft_config.target_parameters or (), model)
        for path, name, wanted in found.values():
            parent, module, child = _get_submodules(model, path)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                if isinstance(module, (nn.Linear, MultiLoraLinear)):
                    self._create_and_replace(peft_config, adapter_name, module, child, parent, current_key=path)
                else:
                    self._adapt_experts(peft_config, adapter_name, model, path, name, wanted)
        known = self.targeted_parameter_names  # PEFT before 0.20 ignores the return value
        known += [key for key in found if key not in known]
        return list(found)

    def _adapt_experts(
        self, config: MultiLoraConfig, adapter_name: str, model: nn.Module, path: str, name: str, target: str
    ) -> None:
        """Put an adapter on the projection ``name`` of the experts ``path``. If no pattern sets its rank, it gets the
        config's rank over the experts per token, and keeps the factor lora_alpha / r."""
        module: Any = model.get_submodule(path)
        experts = module.base_layer if isinstance(module, MultiLoraExperts) else module
        check_parallel(self.model, experts)
        if config.save_inputs != "exact":
            raise ValueError(f'save_inputs={config.save_inputs!r} does not work on experts, here {path}: use "exact".')
        key = f"{path}.{name}"
        ranks, alphas = (cast(dict, pattern) for pattern in (config.rank_pattern, config.alpha_pattern))
        if pattern_value(ranks, key, None) is None:
            rank = ranks[re.escape(target)] = max(1, config.r // experts_per_token(experts))
            if config.lora_alpha is not None and pattern_value(alphas, key, None) is None:
                alphas[re.escape(target)] = config.lora_alpha * rank / config.r
        if not isinstance(module, MultiLoraExperts):
            module = MultiLoraExperts(experts)
            model.set_submodule(path, module)
        if name in module._modules:
            module.get_submodule(name).update_layer(adapter_name, config, key)
        else:
            module.add_module(name, MultiLoraProjection(experts, name, adapter_name, config, key))

    def shared_inputs(self, adapter_name: str = "default") -> dict[tuple[str, ...], str | None]:
        """The groups of an adapter's layers that read their input once, each with None or the reason why it no longer
        does. In evaluation, under torch.compile and under ZeRO-3, every layer reads its own."""
        adapters = (layer.multilora_branches for _, layer in named_layers(self.model))
        groups = {id(a[adapter_name].shared): a[adapter_name].shared for a in adapters if adapter_name in a}
        return {tuple(group.members): group.disabled_reason for group in groups.values() if group is not None}

    def _create_and_replace(  # type: ignore[override]  # PEFT's own differs by version
        self, config: MultiLoraConfig, adapter_name: str, target, target_name: str, parent, current_key: str, **_
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = get_quantization_kwargs(self.model)
        self._check_base(current_key, base, quantization)
        config.fan_in_fan_out = config.fan_in_fan_out or isinstance(base, Conv1D)
        if isinstance(target, MultiLoraLinear):
            target.update_layer(adapter_name, config, current_key)
        else:
            layer = MultiLoraLinear(target, adapter_name, config, current_key, quantization)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # The layer has moved its branches to the base layer's device. BaseTuner would move an 8-bit layer as a whole,
        # with branches that are still on the meta device.
        setattr(parent, child_name, new_module)

    def _check_target_module_compatiblity(self, peft_config, model: Any, target_name: str) -> None:
        try:
            super()._check_target_module_compatiblity(LoraConfig(), model, target_name)
        except ValueError:
            raise Bypassed(
                f"Target module {target_name} is incompatible with Mamba-based models (model_type="
                f"{model.config.model_type!r}), whose kernels read its weight and not its output: leave it out with "
                "exclude_modules."
            ) from None

    def _check_base(self, name: str, base: nn.Module, quantization: dict) -> None:
        check_parallel(self.model, base)
        if in_attention(base):
            raise ValueError(
                f"Target module {name} belongs to an nn.MultiheadAttention, which reads its weight and not its output: "
                "leave it out with exclude_modules."
            )
        dense = isinstance(base, (nn.Linear, Conv1D))
        if not dense and getattr(backend_of(base, **quantization), "layer_type", None) != "linear":
            raise ValueError(
                f"Target module {name} is a {type(base).__name__}, which is not supported: MultiLoRA adapts nn.Linear, "
                "transformers' Conv1D and quantized linear layers."
            )

    def _check_merge_allowed(self) -> None:
        """Check every layer before any is written."""
        super()._check_merge_allowed()
        for _, layer in named_layers(self):
            if layer.chosen():
                layer.check_writable()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, num_beams=None, **kwargs):
        """Pass ``adapter_names``, one per row of the batch, to the layers. PEFT enters this around every forward; the
        first one in training also warns of scales in half precision."""
        if self.training and not self._checked_scales and not torch.compiler.is_compiling():
            self._checked_scales = True
            warn_of_half_scales(self)
        if adapter_names is None:
            yield
            return
        if any(isinstance(layer, MultiLoraProjection) for _, layer in named_layers(self)):
            raise ValueError("adapter_names cannot be used with adapters on experts, which mix the rows of a batch.")
        if self.training:
            raise ValueError("adapter_names cannot be used when the model is in training mode.")
        known = {name for _, layer in named_layers(self) for name in layer.multilora_branches}
        unknown = sorted(set(adapter_names) - known - {"__base__"})
        if unknown:
            raise ValueError(f"adapter_names holds adapters that do not exist: {', '.join(unknown)}.")
        beams = num_beams if isinstance(num_beams, int) else 1
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        unrepeated = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = []
        for module in self.modules():
            if isinstance(module, (MultiLoraLinear, AuxiliaryTrainingWrapper)):
                names = [name for name in adapter_names for _ in range(1 if module in unrepeated else beams)]
                hook = partial(_adapter_names_pre_forward_hook, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add the exact weighted sum of ``adapters`` as a new, inactive adapter that holds all of their branches.

        Raises:
            ValueError: unknown ``adapters``, an ``adapter_name`` that exists, another number of weights than of
                adapters, a ``combination_type`` other than "cat", adapters with modules_to_save or trained biases.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if not adapters or unknown:
            raise ValueError(f"adapters must name adapters of this model, not {unknown or adapters!r}.")
        if len(weights) != len(adapters):
            raise ValueError(f"weights must hold one number per adapter, {len(adapters)}, not {len(weights)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name must be new, but {adapter_name!r} exists.")
        if combination_type != "cat":
            raise ValueError(f'combination_type must be "cat", which is exact, not {combination_type!r}.')
        if any(self.peft_config[name].modules_to_save or self.peft_config[name].bias != "none" for name in adapters):
            raise ValueError("adapters with modules_to_save or trained biases cannot be summed.")
        parts = {}
        for path, layer in named_layers(self.model):
            here = [(Branches.of(layer.multilora_branches[a]), w) for a, w in zip(adapters, weights, strict=True)
                    if a in layer.multilora_branches]  # fmt: skip
            if here:
                parts[path] = stack([b._replace(scaling_factor=b.scaling_factor * w) for b, w in here])
        everything = [name for name, _ in self.model.named_modules()]
        scalar = all(branches.lora_scaling.shape[-1] == 1 for branches in parts.values())
        experts = {path for path, branches in parts.items() if branches.experts is not None}
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            **describe(parts),
            scaling="scalar" if scalar else "vector",
            target_modules=targets(set(parts) - experts, everything),
            target_parameters=sorted(experts) or None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        self.inject_adapter(self.model, adapter_name)
        for path, summed in parts.items():
            module = self.model.get_submodule(path).multilora_branches[adapter_name]
            for name in NAMES:
                tensor = getattr(summed, name)
                getattr(module, name).data = tensor.expand(getattr(module, name).shape).contiguous()


def _check_loaded(model: MultiLoraModel, keys) -> None:
    """After load_state_dict, raise a ValueError for an incomplete adapter, or for another method's tensors on its
    layers. A dict without any of an adapter's tensors, such as the base model's, is fine."""
    mark = f".{CONTAINER}."
    layers = tuple(f".{name}." for name, _ in named_layers(model.model))
    own = ("weight", "bias", "base_layer")
    for key in keys.unexpected_keys:
        inside = next((key.partition(layer)[2] for layer in layers if layer in key), "weight")
        adapter = key.partition(mark)[2].split(".")[:-1]
        # PEFT before 0.20 puts every adapter of a model into the file of each, under its name.
        anothers = len(adapter) == 2 or (len(adapter) == 1 and adapter[0] not in model.peft_config)
        if (mark in key or inside.split(".")[0] not in own) and not anothers:
            raise ValueError(f"the state dict holds {key}, which is no tensor of this model's MultiLoRA adapters.")
    for adapter in model.peft_config:
        missing = [key for key in keys.missing_keys if f"{mark}{adapter}." in key]
        wanted = sum(len(NAMES) for _, layer in named_layers(model.model) if adapter in layer.multilora_branches)
        if 0 < len(missing) < wanted:
            raise ValueError(f"the state dict lacks {missing[0]}, though it holds other tensors of this adapter.")
