"""The layers under comparison: one frozen nn.Linear with each kind of adapter around it, as modules of x."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multilora_fast import FusedMultiLoRALinear, MultiLoRALinear
from multilora_fast.benchmark.layer import base_layer, candidates, multilora, peft_lora
from multilora_fast.peft.layer import MultiLoraBranches

COMPILED, LORA_FLOAT32, CONCATENATED, ADDMM, FP8 = (
    "reference loop, compiled", "PEFT LoRA, float32 adapters", "concatenated eager", "addmm_ LoRA", "ours, fp8 inputs",
)  # fmt: skip
LORA_COMPILED, OURS_COMPILED, OURS_TORCH = "PEFT LoRA, compiled", "ours, compiled", 'ours, backend="torch"'
LORA_GRAPHS, OURS_GRAPHS = "PEFT LoRA, compiled, CUDA graphs", "ours, compiled, CUDA graphs"


class Concatenated(FusedMultiLoRALinear):
    """The op's algebra in plain torch, differentiated by autograd: x̂ Ãᵀ, then B̃ᵀ built from scales and B."""

    def forward(self, x: Tensor) -> Tensor:
        H = F.linear(self.lora_dropout(x), self.lora_A.flatten(0, 1))
        B = (self.lora_B * (self.scaling_factor * self.lora_scaling).unsqueeze(2)).transpose(0, 1).flatten(1)
        return F.linear(x, self.weight, self.bias) + F.linear(H, B)


class AddmmLoRA(nn.Module):
    """One LoRA of rank R with in-place accumulating products, like hand-written LoRA libraries; no dropout or bias."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(base.weight.new_empty(rank, base.in_features).normal_(std=base.in_features**-0.5))
        self.B = nn.Parameter(base.weight.new_empty(base.out_features, rank).normal_(std=rank**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return _Addmm.apply(x, self.base.weight, self.A, self.B)


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, A, B):
        ctx.save_for_backward(x, weight, A, B)
        return F.linear(x, weight).addmm_(x @ A.t(), B.t())

    @staticmethod
    def backward(ctx, dy):
        x, weight, A, B = ctx.saved_tensors
        dH = dy @ B
        dx = (dy @ weight).addmm_(dH, A)
        return dx, None, dH.t() @ x, dy.t() @ (x @ A.t())


def layers(
    K: int, N: int, n: int, r: int, p: float, dtype: torch.dtype, device: str, compiled: Collection[str] = (COMPILED,)
) -> dict[str, nn.Module]:
    """Return every candidate that supports these settings, by name; compiled ones only if listed in ``compiled``."""

    def base():
        return base_layer(K, N, dtype, device)

    found = candidates(K, N, n, r, p, dtype, device)
    found[CONCATENATED] = multilora(Concatenated, base(), n, r, p)
    if dtype != torch.float32:
        found[LORA_FLOAT32] = peft_lora(base(), n * r, p, float32=True)
    if p == 0:
        found[ADDMM] = AddmmLoRA(base(), n * r)
    if device == "cuda":  # elsewhere "ours" already runs on torch
        found[OURS_TORCH] = on_torch(multilora(FusedMultiLoRALinear, base(), n, r, p))
    if can_compile(device):
        eager = {
            COMPILED: lambda: multilora(MultiLoRALinear, base(), n, r, p),
            LORA_COMPILED: lambda: peft_lora(base(), n * r, p),
            OURS_COMPILED: lambda: multilora(FusedMultiLoRALinear, base(), n, r, p),
        }
        found |= {name: torch.compile(eager[name]()) for name in eager if name in compiled}
    return found


def on_torch(model: nn.Module) -> nn.Module:
    """Run every fused layer of ``model`` on torch matmuls, and return the model."""
    for layer in model.modules():
        if isinstance(layer, (FusedMultiLoRALinear, MultiLoraBranches)):
            layer.backend = "torch"
    return model


def can_compile(device: str) -> bool:
    """Whether torch.compile has a code generator: a C++ compiler on a CPU, Triton on a GPU."""
    import shutil

    return device == "cuda" or shutil.which("g++") is not None
