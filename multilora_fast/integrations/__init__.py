"""Plugins for trainers, each in a file that only its trainer imports (docs/trainers.md)."""

from dataclasses import fields
from typing import Any

from peft import LoraConfig

from multilora_fast.peft import MultiLoraConfig


def as_multilora(lora: LoraConfig, **options: Any) -> MultiLoraConfig:
    """The MultiLoraConfig of a trainer's LoraConfig, whose r is that of a branch, with further ``options``.

    Raises:
        ValueError: a field that only LoRA has is not at its default, or an option that MultiLoraConfig does not have.
    """
    ours = {field.name for field in fields(MultiLoraConfig)} - {"peft_type"}
    unknown = sorted(set(options) - ours)
    if unknown:
        raise ValueError(f"{unknown[0]} is no field of MultiLoraConfig.")
    defaults, taken = LoraConfig(), {}
    for name, value in vars(lora).items():
        if name in ours:
            taken[name] = value
        elif name != "peft_type" and (value or None) != (getattr(defaults, name, None) or None):
            raise ValueError(f"{name}={value!r} is LoRA's alone: MultiLoRA has no such option.")
    taken |= {"lora_dropout": lora.lora_dropout or 0.0, "fan_in_fan_out": bool(lora.fan_in_fan_out)}
    taken["target_parameters"] = lora.target_parameters or None
    return MultiLoraConfig(**taken | options)
