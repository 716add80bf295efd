"""Configs and settings of small plans."""

import torch
from transformers import LlamaConfig

from multilora_fast.memory.step import StepSettings


def config(layers=5, **options) -> LlamaConfig:
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    return LlamaConfig(**{**sizes, "num_hidden_layers": layers, "num_key_value_heads": 2, **options})


def settings(**options) -> StepSettings:
    return StepSettings(
        **{
            "seq_len": 64, "r": 8, "lora_num": 3, "dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16,
            "lora_dropout": 0.0, "target_modules": "all-linear", "quantization": None, "checkpointing": False,
            "optimizer": "adamw", "device": "cuda", **options,
        }
    )  # fmt: skip
