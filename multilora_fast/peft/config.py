"""The configuration of a MultiLoRA adapter in PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from multilora_fast.peft.register import peft_type
from multilora_fast.validation import (
    check_config,
    check_expression,
    check_hyperparameters,
    check_names,
    check_save_inputs,
    check_switch,
)


@dataclass
class MultiLoraConfig(PeftConfig):
    """``lora_num`` parallel LoRA branches of rank ``r`` with learned scales, on every target module.

    The scales start at zero. Use 3 to 10 times LoRA's learning rate. Fields that are not listed mean the
    same as in peft.LoraConfig.

    Args:
        r: rank of each branch.
        lora_num: branches per module.
        target_modules: names of modules or the ends of their names, one regular expression, or "all-linear". None takes
            PEFT's LoRA defaults for this architecture.
        target_parameters: names of projections of experts or the ends of their names, such as "experts.gate_up_proj"
            and "experts.down_proj". Experts get the rank r // (experts per token), at least 1, unless rank_pattern sets
            it.
        exclude_modules: modules not to adapt, as names or one regular expression.
        lora_alpha: the branches are multiplied by lora_alpha / r; None stands for r.
        lora_dropout: dropout on the branches' input, with one mask for all branches.
        scaling: a branch's learned scale: a "vector" of out_features values, or a "scalar".
        init_weights: True starts the scales at zero, so that the base model's output is unchanged; False draws them,
            for tests.
        fan_in_fan_out: whether the weights are stored as (in, out). Detected, and kept for exports.
        bias: which biases of the base model are trained: "none", "all", or "lora_only" (the adapted modules'). Only one
            adapter of a model can train biases.
        modules_to_save: modules to train and save whole.
        layers_to_transform, layers_pattern: indices of the layers to adapt, and the name of their list.
        save_inputs: "exact", or "fp8" to save the layers' inputs for backward in 8 bits unless something else saves
            them; lora_A's gradients are then off by 2 to 3 %, all others are exact. Not under torch.compile.
        share_inputs: in training, layers that read one input (q, k, v; gate, up) read it once. Results differ only in
            rounding; with dropout, the layers share a mask.
        exact_base: always compute the base layer's product with torch, so that zero scales leave the base model's bits.
            By default the joint kernel computes it on GPUs and sizes for which that was measured to be faster.
        base_model_type: transformers' name of the base model's architecture. Detected, and kept for exports.
        rank_pattern, lora_num_pattern, alpha_pattern: r, lora_num and lora_alpha of modules whose name ends in a match
            of the key.

    Raises:
        ValueError: a value outside its range, or fields that exclude each other.
    """

    r: int = 32
    lora_num: int = 3
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    scaling: Literal["vector", "scalar"] = "vector"
    init_weights: bool = True
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    save_inputs: Literal["exact", "fp8"] = "exact"
    share_inputs: bool = True
    exact_base: bool = False
    base_model_type: str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    lora_num_pattern: dict | None = field(default_factory=dict)

    # Not fields: attributes that trainers read of a LoraConfig.
    use_dora = use_rslora = lora_bias = False

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type()
        for name in ("rank_pattern", "alpha_pattern", "lora_num_pattern"):
            setattr(self, name, getattr(self, name) or {})
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                check_expression(name, value)
        check_hyperparameters(r=self.r, lora_num=self.lora_num, lora_dropout=self.lora_dropout, scaling=self.scaling)
        check_config(vars(self))
        check_save_inputs(self.save_inputs)
        for name in ("init_weights", "share_inputs", "exact_base", "fan_in_fan_out", "inference_mode"):
            check_switch(name, getattr(self, name))
        check_names("modules_to_save", self.modules_to_save)
        check_names("target_parameters", self.target_parameters)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f'bias must be "none", "all" or "lora_only", not {self.bias!r}.')
        if self.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(f"bias={self.bias!r} needs PEFT 0.21, which saves the biases of every method.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform.")
        expression = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        for name in ("layers_to_transform", "layers_pattern"):
            if expression and getattr(self, name) is not None:
                raise ValueError(f"{name} cannot be used when target_modules is a regular expression.")
