"""Layers that share an input, under checkpointing that parts them, or after they stopped sharing: a region must save in
its recomputation what it saved in its forward."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from multilora_fast import MultiLoRALinear, fuse

NAMES = ("q_proj", "k_proj", "v_proj")


def pair() -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Layers alone, and the same in a group."""
    alone = nn.ModuleDict({name: MultiLoRALinear(nn.Linear(8, 6).double(), r=2, lora_num=2) for name in NAMES})
    for layer in alone.values():
        nn.init.normal_(layer.lora_scaling)
    together = copy.deepcopy(alone)
    fuse(alone, share_inputs=False)
    fuse(together)
    return alone, together


def total(model, x, *names):
    return sum(model[name](x).sin().sum() for name in names)


def region(model, x, *names):
    return checkpoint(lambda x: total(model, x, *names), x, use_reentrant=False)


def fails(model):
    """Forwards that stop after one layer, as when memory runs out."""
    for _ in range(4):
        model.q_proj(torch.randn(3, 8, dtype=torch.float64))


STEPS = {
    "each in a region": lambda m, x: sum(region(m, x, name) for name in NAMES),
    "two regions and none": lambda m, x: region(m, x, "q_proj") + region(m, x, "k_proj") + total(m, x, "v_proj"),
    "a region, then none": lambda m, x: region(m, x, "q_proj", "k_proj") + total(m, x, "v_proj"),
    "none, then a region": lambda m, x: total(m, x, "v_proj") + region(m, x, "q_proj", "k_proj"),
    "a region, then other inputs": lambda m, x: region(m, x, *NAMES) + sum(total(m, i * x, "q_proj") for i in (2, 3)),
    "nested": lambda m, x: checkpoint(lambda x: sum(region(m, x, n) for n in NAMES), x, use_reentrant=False),
    "several before a backward": lambda m, x: sum(region(m, i * x, *NAMES) for i in range(1, 4)),
}  # fmt: skip


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_gradients_are_those_of_layers_alone(step, failed):
    found = []
    for model in pair():
        if failed:
            fails(model)
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 8).requires_grad_()
        for _ in range(3):
            STEPS[step](model, x).backward()
        found.append({"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}})
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_a_group_that_a_failed_forward_stopped_returns(served):
    _, model = pair()
    fails(model)
    calls = []
    for _ in range(3):
        served.clear()
        region(model, torch.randn(3, 8, dtype=torch.float64, requires_grad=True), *NAMES).backward()
        calls.append(list(served))
    assert calls == [[], [3, 3], [3, 3]]


def test_regions_that_part_a_group_end_it(served):
    _, model = pair()
    for _ in range(3):
        STEPS["each in a region"](model, torch.randn(3, 8, dtype=torch.float64, requires_grad=True)).backward()
    assert served == [3] * 6  # in the first step
