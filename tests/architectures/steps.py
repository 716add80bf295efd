"""An architecture under either method or with the loop, a training step of it, and how results compare."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from building import Architecture
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from multilora_fast import MultiLoraConfig
from multilora_fast.peft import MultiLoraLinear

RANK = {"r": 2, "lora_alpha": 3}


class Loop(nn.Module):
    """The reference's loop over branches on a base layer of any kind, with new tensors at every step."""

    def __init__(self, layer: MultiLoraLinear):
        super().__init__()
        branches = layer.multilora_branches["default"]
        self.base_layer, self.factor, self.dropout = layer.base_layer, branches.scaling_factor, branches.lora_dropout
        self.lora_A, self.lora_B, self.lora_scaling = branches.lora_A, branches.lora_B, branches.lora_scaling

    @property
    def weight(self) -> Tensor:  # which some models read the dtype of
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.base_layer(x), self.dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        for A, B, s in zip(self.lora_A, self.lora_B, self.lora_scaling, strict=True):
            y = y + (nn.functional.linear(nn.functional.linear(x, A), B) * (self.factor * s)).to(y.dtype)
        return y


def multilora(of: Architecture, model: nn.Module | None = None, *, double: bool = True, **options):
    """The architecture under MultiLoRA with scales as after training, in float64."""
    torch.manual_seed(1)
    model = of.build() if model is None else model
    settings = {"targets": of.targets, "exclude": of.exclude, "init_weights": False, **RANK, **options}
    config = MultiLoraConfig(
        lora_num=3, target_modules=settings.pop("targets"), exclude_modules=settings.pop("exclude"), **settings
    )
    return get_peft_model(model.double() if double else model, config)


def lora(of: Architecture, *, double: bool = True, **options):
    torch.manual_seed(1)
    model = of.build()
    options = {
        "target_modules": of.targets,
        "exclude_modules": of.exclude,
        "init_lora_weights": False,
        **RANK,
        **options,
    }
    config = LoraConfig(**options)
    return get_peft_model(model.double() if double else model, config)


def loop(model: Any):
    """A copy of the model with the loop in place of each of our layers, and the same values."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, MultiLoraLinear):
            twin.set_submodule(name, Loop(layer))
    return twin


def ran(of: Architecture, model: nn.Module, *, seed: int = 0, autocast: bool = False) -> list[Tensor]:
    """The floating tensors of what the model answers, largest depths first in its own order."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {k: v.to(dtype) if is_floating(v) else copy.deepcopy(v) for k, v in of.inputs().items()}
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        return tensors(model(**inputs))


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if hasattr(out, "values"):
        out = list(out.values())
    return [t for value in out for t in tensors(value)] if isinstance(out, (list, tuple)) else []


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A number that depends on every output in its own way."""
    total = torch.zeros(())
    for out in outputs:
        if out.requires_grad:
            weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64) * 0.7).view(out.shape)
            total = total + (out.double() * weights).mean()
    return total


def gradients(of: Architecture, model: nn.Module, **options) -> dict[str, Tensor | None]:
    """The gradients of a training step, by the names of the trainable parameters, which are the loop's too."""
    model.train()
    model.zero_grad()
    loss_of(ran(of, model, **options)).backward()
    return {
        name.replace("multilora_branches.default.", ""): p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def assert_equal(ours: dict[str, Tensor | None], wanted: dict[str, Tensor | None], tolerance: float = 1e-8) -> None:
    """Relative to each gradient's norm, but for what a float64 of the largest one is rounded by."""
    assert ours.keys() == wanted.keys()
    largest = max(g.norm().item() for g in wanted.values() if g is not None)
    assert largest > 0
    for name, exact in wanted.items():
        got = ours[name]
        assert (got is None) == (exact is None), f"{name} has {'no' if got is None else 'a'} gradient"
        if got is not None and exact is not None:
            error, bound = (got - exact).norm().item(), tolerance * exact.norm().item() + 1e-13 * largest
            assert error <= bound, f"{name} is off by {error:.3g}, of {exact.norm():.3g}"


def assert_close(ours: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(ours) == len(wanted) > 0
    for a, b in zip(ours, wanted, strict=True):
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= tolerance * b.abs().max(), f"off by {(a - b).abs().max():.3g}"


def assert_differ(ours: list[Tensor], others: list[Tensor]) -> None:
    assert any((a - b).abs().max() > 1e-6 * b.abs().max() for a, b in zip(ours, others, strict=True))


def distance(found: dict, exact: dict) -> float:
    total = sum(g.norm() ** 2 for g in exact.values() if g is not None)
    off = sum((found[name] - g).norm() ** 2 for name, g in exact.items() if g is not None)
    return ((off / total) ** 0.5).item()


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
