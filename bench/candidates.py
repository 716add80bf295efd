"""The layers that are compared, each with its own copy of one frozen nn.Linear, as callables of x."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from multilora_fast import FusedMultiLoRALinear, MultiLoRALinear


def base_layer(K: int, N: int, dtype: torch.dtype, device: str) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=False, dtype=dtype, device=device).requires_grad_(False)


def multilora(cls: type[MultiLoRALinear], base: nn.Linear, n: int, r: int, p: float) -> MultiLoRALinear:
    torch.manual_seed(1)
    layer = cls(base, r=r, lora_num=n, lora_dropout=p)
    nn.init.normal_(layer.lora_scaling)
    return layer


def peft_lora(base: nn.Linear, rank: int, p: float) -> nn.Module:
    """PEFT's LoRA of the same total rank, adapters in the base's dtype."""
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=p, target_modules=["0"])
    return get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)


def layers(K: int, N: int, n: int, r: int, p: float, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    def base():
        return base_layer(K, N, dtype, device)

    return {
        "frozen base": base(),
        "reference": multilora(MultiLoRALinear, base(), n, r, p),
        "PEFT LoRA": peft_lora(base(), n * r, p),
        "ours": multilora(FusedMultiLoRALinear, base(), n, r, p),
    }
