"""MultiLoRA, parallel LoRA branches with learned scales inside one adapter, at the cost of LoRA."""

from multilora_fast.functional import dropout_mask, multilora_add, multilora_linear
from multilora_fast.layers import FusedMultiLoRALinear, FuseReport, fuse, unfuse
from multilora_fast.reference import MultiLoRALinear

__version__ = "0.1.0"

__all__ = [
    "FuseReport",
    "FusedMultiLoRALinear",
    "MultiLoRALinear",
    "dropout_mask",
    "fuse",
    "multilora_add",
    "multilora_linear",
    "unfuse",
]
