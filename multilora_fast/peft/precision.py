"""The dtypes of bases, and of trainable branches. In half precision, small steps of lora_A and lora_B are rounded away
(at a learning rate of 2e-5 in bfloat16, 6 % of lora_A's entries moved), except under DeepSpeed, which steps float32
masters."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import nn

from multilora_fast.adapters.branches import NAMES
from multilora_fast.peft.layer import named_layers

HALF = (torch.bfloat16, torch.float16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def restore_float32(model: nn.Module) -> int:
    """Cast lora_A, lora_B and lora_scaling of every MultiLoRA adapter in ``model`` from half precision to float32.

    Call it before the first step if something has cast them, such as TRL's trainers on a quantized base. The Parameter
    objects stay, so an existing optimizer stays valid. Returns the number of tensors that were cast.

    Raises:
        ValueError: no MultiLoRA adapter in the model, or an adapter that FSDP2 has already sharded.
    """
    adapters = [branches for _, layer in named_layers(model) for branches in layer.multilora_branches.values()]
    if not adapters:
        raise ValueError("model holds no MultiLoRA adapter to restore.")
    half = [p for branches in adapters for p in map(branches.get_parameter, NAMES) if p.dtype in HALF]
    if any(hasattr(p, "device_mesh") for p in half):
        raise ValueError("model is sharded by FSDP2, which has fixed its dtypes: call restore_float32 before it.")
    for p in half:
        p.data = p.data.float()
        p.grad = None if p.grad is None else p.grad.float()
    return len(half)


def warn_of_half_scales(model: nn.Module) -> None:
    """Warn if trainable branches are kept in half precision."""
    # Under FSDP a plain tensor may be a low-precision copy of a float32 parameter.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    sharded = any(isinstance(module, kinds) for module in model.modules())
    for _, layer in named_layers(model):
        for branches in layer.multilora_branches.values():
            for name in reversed(NAMES):
                p = getattr(branches, name)
                has_masters = hasattr(p, "_hp_mapping") or hasattr(p, "ds_id")  # DeepSpeed's ZeRO-1 and 2, ZeRO-3
                kept = hasattr(p, "device_mesh") or not (sharded or has_masters)
                if p.requires_grad and p.dtype in HALF and kept:
                    warnings.warn(
                        f"{name} is trained in {str(p.dtype).removeprefix('torch.')}, where most small steps of lora_A "
                        "and lora_B are rounded away: call multilora_fast.peft.restore_float32(model) before training.",
                        stacklevel=2,
                    )
                    return
