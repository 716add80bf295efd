"""Fuse a model that has MultiLoRALinear layers: ``python examples/fuse_existing.py``."""

import torch
from torch import nn

from multilora_fast import MultiLoRALinear, fuse
from multilora_fast.adapters import load_adapter, save_adapter


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).requires_grad_(False)


def main(directory: str = "adapter") -> float:
    model = blocks()
    for i in (0, 2):  # or your own class with the same attributes
        model[i] = MultiLoRALinear(model[i], r=4, lora_num=3, lora_alpha=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    print(fuse(model))  # the same Parameters: the optimizer stays valid
    x, target = torch.randn(32, 64), torch.randn(32, 64)
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_adapter(model, directory)
    again = blocks()
    load_adapter(again, directory)
    return (again(x) - model(x)).abs().max().item()


if __name__ == "__main__":
    print(f"the loaded adapter differs by {main():.1g}")
