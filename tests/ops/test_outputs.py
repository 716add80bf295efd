"""Every output is a tensor of its own, without a copy: in-place operations may follow."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from multilora_fast import FusedMultiLoRALinear, MultiLoraConfig, MultiLoRALinear, fuse, multilora_add
from multilora_fast.testing import random_case, run

SHAPES = [(8,), (5, 8), (2, 3, 8), (2, 1, 3, 8)]


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"x": x.grad, **found}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_activation_in_place_after_a_layer(shape, backend):
    loop = MultiLoRALinear(nn.Linear(8, 6), r=2, lora_num=2).double()
    nn.init.normal_(loop.lora_scaling)
    fused = FusedMultiLoRALinear(nn.Linear(8, 6), r=2, lora_num=2).double()
    fused.load_state_dict(loop.state_dict())
    fused.backend = backend
    x = torch.randn(shape, dtype=torch.float64)
    wanted, found = (gradients(nn.Sequential(layer, nn.ReLU(inplace=True)), x) for layer in (loop, fused))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
    fused.lora_dropout.p = 0.3
    assert nn.Sequential(fused, nn.ReLU(inplace=True))(x).min() >= 0


@pytest.mark.parametrize("base", [nn.Linear(8, 6), Conv1D(6, 8), nn.Bilinear], ids=["Linear", "Conv1D", "hooked"])
@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_in_place_after_a_peft_layer(shape, base):
    hooked = base is nn.Bilinear
    base = nn.Linear(8, 6) if hooked else base
    model = nn.Sequential(base, nn.ReLU(inplace=True))
    if hooked:  # which runs itself, and the branches are added to its output
        base.register_forward_hook(lambda *_: None)
    model = get_peft_model(model, MultiLoraConfig(r=2, lora_num=2, target_modules=["0"], init_weights=False))
    gradients(model, torch.randn(shape))


def test_in_place_after_layers_that_share_their_input():
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: MultiLoRALinear(nn.Linear(8, 6), r=2, lora_num=2) for name in ("w1", "w3")})
        fuse(model)
        x = torch.randn(2, 5, 8, requires_grad=True)
        outs = [nn.functional.relu(layer(x), inplace=inplace) for layer in model.values()]
        (outs[0] * outs[1]).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_in_place_after_branches_added_to_an_output():
    case = random_case((6, 24), 16, 3, 4, bias=False)
    y = torch.randn(6, 16)

    def op(x, weight, lora_A, lora_B, lora_scaling, bias=None):
        return multilora_add(y, x, lora_A, lora_B, lora_scaling).relu_()

    run(op, case, ["x", "lora_A", "lora_B", "lora_scaling"])
    assert y.min() < 0


class Made(TorchDispatchMode):
    """Collects the tensors of ``size`` elements that operations return."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.made = size, []  # kept, so that no memory is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.size:
            self.made.append(out)
        return out


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(40, 24), (2, 20, 24)], ids=str)
def test_a_forward_makes_one_tensor_of_the_outputs_size(shape, backend):
    case = random_case(shape, 56, 3, 4)
    layer = FusedMultiLoRALinear(nn.Linear(24, 56), r=4, lora_num=3)
    layer.backend = backend
    with Made(40 * 56) as made:
        out = layer(case.x)
    assert {t.untyped_storage().data_ptr() for t in made.made} == {out.untyped_storage().data_ptr()}
