"""Plugins for trainers, each in a file that only its trainer imports (docs/trainers.md)."""

from dataclasses import MISSING, fields
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
    taken = {}
    for field in fields(lora):
        value = getattr(lora, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in ours:
            taken[field.name] = value
        elif field.name != "peft_type" and (value or default) and value != default:
            raise ValueError(f"{field.name}={value!r} is LoRA's alone: MultiLoRA has no such option.")
    taken |= {"lora_dropout": lora.lora_dropout or 0.0, "fan_in_fan_out": bool(lora.fan_in_fan_out)}
    taken["target_parameters"] = lora.target_parameters or None
    return MultiLoraConfig(**taken | options)
