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

    The scales start at zero, and at first they alone move: take 3 to 10 times the learning rate of LoRA.

    Fields that are not listed are PEFT's own, and mean what they mean in peft.LoraConfig.

    Args:
        r: rank of each branch.
        lora_num: branches per module.
        target_modules: names of the modules to adapt or the end of their names, or one regular expression, or
            "all-linear". None takes those that LoRA takes for this architecture.
        target_parameters: names of the projections of experts to adapt, or the end of their names, such as
            "experts.gate_up_proj" and "experts.down_proj". Experts get r // (experts per token), at least 1, where
            rank_pattern says nothing else.
        exclude_modules: modules to leave alone, as names or one regular expression.
        lora_alpha: the branches are multiplied by lora_alpha / r; None stands for r.
        lora_dropout: dropout on the input of the branches, one mask for all of them.
        scaling: whether a branch's learned scale is a "vector" of out_features values, or a "scalar".
        init_weights: True starts the scales at zero, so that the model answers as before; False draws them, for tests.
        fan_in_fan_out: whether the weights are stored as (in, out). Found out from the modules, and kept for exports.
        bias: which biases of the base model are trained too: "none", "all", or "lora_only", the adapted modules'. Only
            one adapter of a model can train biases.
        modules_to_save: modules to train and save whole.
        layers_to_transform, layers_pattern: indices of the layers to adapt, and the name of the list they are in.
        save_inputs: "exact", or "fp8" to keep the layers' inputs for backward in 8 bits where nothing else keeps them;
            lora_A's gradients are then off by 2 to 3 %, all others stay exact. Not under torch.compile.
        share_inputs: let layers that read one input (q, k, v; gate, up) read it once in training. The result is the
            same but for rounding, and with dropout one mask serves all of them.
        exact_base: keep the base layer's product the library's, so that scales of zero leave the base model's bits. By
            default a GPU for which it was measured to be faster computes it together with the branches.
        base_model_type: what transformers calls the base model's architecture. Found out from the model, and kept for
            exports.
        rank_pattern, lora_num_pattern, alpha_pattern: r, lora_num and lora_alpha of modules whose name ends in a
            match of the key.

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

    # No fields: what trainers ask of a LoRA's config.
    use_dora = use_rslora = lora_bias = False

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type()
        for name in ("rank_pattern", "alpha_pattern", "lora_num_pattern"):
            setattr(self, name, getattr(self, name) or {})
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        check_hyperparameters(r=self.r, lora_num=self.lora_num, lora_dropout=self.lora_dropout, scaling=self.scaling)
        check_config(vars(self))
        check_save_inputs(self.save_inputs)
        for name in ("init_weights", "share_inputs", "exact_base", "fan_in_fan_out", "inference_mode"):
            check_switch(name, getattr(self, name))
        check_names("modules_to_save", self.modules_to_save)
        check_names("target_parameters", self.target_parameters)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                check_expression(name, getattr(self, name))
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
