"""Layers on the fused op, and the swap of a model's layers for them."""

from multilora_fast.layers.fuse import FuseReport, fuse, unfuse
from multilora_fast.layers.fused import FusedMultiLoRALinear

__all__ = ["FuseReport", "FusedMultiLoRALinear", "fuse", "unfuse"]
