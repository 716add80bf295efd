"""The experts of one frozen MoE layer, with PEFT's LoRA on their parameters and with branches: modules of x that
include a fixed routing, and the memory of each.

Memory is counted on meta tensors, for a GPU's kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from multilora_fast.memory import saved_bytes
from multilora_fast.memory.cuda import kernels
from multilora_fast.memory.measure import AliveBytes
from multilora_fast.memory.methods import LORA, OURS
from multilora_fast.peft import MultiLoraConfig

FROZEN, AUTOGRAD = "frozen experts", "branches by autograd"
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True)
class Size:
    """E experts with H hidden and I intermediate features, k per token; adapters have total rank R."""

    E: int
    k: int
    H: int
    I: int
    R: int


SIZES = {"Qwen3-30B-A3B": Size(128, 8, 2048, 768, 24), "Mixtral-8x7B": Size(8, 2, 4096, 14336, 48)}
TINY = Size(4, 2, 32, 16, 24)


class Routed(nn.Module):
    """Experts with a routing drawn once; every token goes to k different experts."""

    def __init__(self, experts: nn.Module, size: Size, tokens: int):
        super().__init__()
        self.experts = experts
        g = torch.Generator().manual_seed(3)
        chosen = torch.rand(tokens, size.E, generator=g).topk(size.k).indices
        weight: Any = next(experts.parameters())
        self.register_buffer("index", chosen.to(weight.device))
        self.weights = nn.Parameter(weight.new_full((tokens, size.k), 1 / size.k))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.index, self.weights)


class ByAutograd(nn.Module):
    """Our experts, with two torch grouped products per branch, differentiated by autograd."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *args: Tensor) -> Tensor:
        with patch("multilora_fast.peft.experts.project", _by_autograd):
            return self.experts(*args)


def _by_autograd(experts: Any, name: str, branches: list, x: Tensor, perm: Tensor, ends: Tensor, top_k=None) -> Tensor:
    x = x if top_k is None else x[perm // top_k]
    rows = torch.arange(len(x), device=x.device, dtype=ends.dtype)
    owner = torch.searchsorted(ends, rows, right=True)
    y = _grouped(x, getattr(experts, name), ends)
    for one in branches:
        dropped = one.lora_dropout(x)
        for A, B, s in zip(one.lora_A.unbind(1), one.lora_B.unbind(1), one.lora_scaling.unbind(1), strict=True):
            y = y + s[owner] * _grouped(_grouped(dropped, A, ends), B, ends)
    return y


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x_e (S, K) W_eᵀ for the weights (E, N, K), expert by expert in float64, which torch's grouped product does not
    support.
    """
    if x.dtype != torch.float64:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([part @ w.t() for part, w in zip(parts, weight, strict=True)])


def layers(size: Size, n: int, p: float, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """A builder of each candidate, a module of (x, top_k_index, top_k_weights). PEFT's LoRA has no dropout here."""
    both: dict[str, Any] = {"target_modules": [], "target_parameters": TARGETS}
    lora = LoraConfig(r=size.R, lora_alpha=size.R, init_lora_weights=False, **both)

    def branches() -> PeftConfig:
        ranks = dict.fromkeys(TARGETS, size.R // n)
        return MultiLoraConfig(lora_num=n, rank_pattern=ranks, lora_dropout=p, init_weights=False, **both)

    def adapted(config: PeftConfig) -> Any:
        model: Any = nn.ModuleDict({"experts": _experts(size, dtype, device)})
        return get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model["experts"].train()

    return {
        FROZEN: lambda: _experts(size, dtype, device),
        LORA: lambda: adapted(lora),
        AUTOGRAD: lambda: ByAutograd(adapted(branches())),
        OURS: lambda: adapted(branches()),
    }


def _experts(size: Size, dtype: torch.dtype, device: str) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=size.H, moe_intermediate_size=size.I, num_experts=size.E, num_experts_per_tok=size.k
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device(device):
        experts = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
    return experts


def memory(name: str, size: Size, n: int, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """Bytes saved by the forward, and the peak over forward and backward. Excludes parameters, x, dy and the routing;
    includes gradients.
    """
    layer = layers(size, n, 0.0, dtype, "meta")[name]()
    with FakeTensorMode(), kernels():
        for module in layer.modules():
            for key, old in module._parameters.items():
                if old is not None:
                    module._parameters[key] = nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
        layer = Routed(layer, size, tokens)
        x = torch.empty(tokens, size.H, dtype=dtype, requires_grad=True)
        dy = torch.empty(tokens, size.H, dtype=dtype)
        given = [*layer.parameters(), *layer.buffers()]
        with saved_bytes(given) as saved, AliveBytes([]):
            layer(x)
        total = saved.total
        saved.clear()
        alive = AliveBytes([*given, x, dy])
        with alive:
            layer(x).backward(dy)
    return total, max(alive.peaks.values())


def rows(sizes: dict[str, Size], n: int = 3, tokens: int = 4096) -> list[dict]:
    """For every size and candidate: bytes saved per token, constant bytes, and the peak."""
    found = []
    for label, size in sizes.items():
        print(f"Counting one layer's experts of {label} ...")
        settings = {"size": label, **vars(size), "n": n, "tokens": tokens, "dtype": "bfloat16"}
        for name in (FROZEN, LORA, AUTOGRAD, OURS):
            (half, _), (whole, peak) = (memory(name, size, n, torch.bfloat16, t) for t in (tokens // 2, tokens))
            per_token = (whole - half) / (tokens - tokens // 2)
            constant = round(whole - per_token * tokens)
            found.append({**settings, "name": name, "per_token": per_token, "constant": constant, "peak": peak})
    return found
