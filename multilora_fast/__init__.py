"""MultiLoRA, parallel LoRA branches with learned scales inside one adapter, at the cost of LoRA."""

import importlib
from typing import TYPE_CHECKING

from multilora_fast.functional import dropout_mask, multilora_add, multilora_linear
from multilora_fast.layers import FusedMultiLoRALinear, FuseReport, fuse, unfuse
from multilora_fast.reference import MultiLoRALinear

if TYPE_CHECKING:
    from multilora_fast.export import export_lora
    from multilora_fast.peft import MultiLoraConfig
    from multilora_fast.plan import plan_memory
    from multilora_fast.spectrum import singular_values
    from multilora_fast.task_arithmetic import from_loras

__version__ = "0.1.0"

__all__ = [
    "FuseReport",
    "FusedMultiLoRALinear",
    "MultiLoRALinear",
    "MultiLoraConfig",
    "dropout_mask",
    "export_lora",
    "from_loras",
    "fuse",
    "multilora_add",
    "multilora_linear",
    "plan_memory",
    "singular_values",
    "unfuse",
]

# Loaded at their first touch: importing the library loads torch and nothing heavier.
_LAZY = {
    "MultiLoraConfig": "multilora_fast.peft",
    "export_lora": "multilora_fast.export",
    "from_loras": "multilora_fast.task_arithmetic",
    "plan_memory": "multilora_fast.plan",
    "singular_values": "multilora_fast.spectrum",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
