"""MultiLoRA, parallel LoRA branches with learned scales inside one adapter, at the cost of LoRA."""

import importlib
from typing import TYPE_CHECKING

from multilora_fast.layers import FusedMultiLoRALinear, FuseReport, fuse, unfuse
from multilora_fast.ops.functional import dropout_mask, multilora_add, multilora_linear
from multilora_fast.reference import MultiLoRALinear

if TYPE_CHECKING:
    from multilora_fast.adapters.export import export_lora
    from multilora_fast.adapters.merge import from_loras
    from multilora_fast.memory.plan import plan_memory
    from multilora_fast.peft import MultiLoraConfig
    from multilora_fast.spectrum import singular_values

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

# Imported lazily: importing the library loads torch and nothing heavier.
_LAZY = {
    "MultiLoraConfig": "multilora_fast.peft",
    "export_lora": "multilora_fast.adapters.export",
    "from_loras": "multilora_fast.adapters.merge",
    "plan_memory": "multilora_fast.memory.plan",
    "singular_values": "multilora_fast.spectrum",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
