"""The op under torch.func and torch.jit.trace, and batches of gradients, which it refuses."""

import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from multilora_fast import FusedMultiLoRALinear, MultiLoraConfig, MultiLoRALinear, dropout_mask, fuse, multilora_linear
from multilora_fast.testing import NAMES, random_case


def layers(**options):
    """A fused layer in float64 and the reference loop with its parameters."""
    loop = MultiLoRALinear(nn.Linear(8, 6), r=2, lora_num=3, **options).double()
    nn.init.normal_(loop.lora_scaling)
    fused = FusedMultiLoRALinear(nn.Linear(8, 6), r=2, lora_num=3, **options).double()
    fused.load_state_dict(loop.state_dict())
    return fused, loop


def loss(layer):
    parameters = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    return parameters, lambda p, x: torch.func.functional_call(layer, p, (x,)).square().sum()


@pytest.mark.parametrize("shape", [(8,), (2, 5, 8)], ids=str)
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp", "hessian"])
def test_torch_func_gives_the_loops_result(transform, shape):
    x, found = torch.randn(shape, dtype=torch.float64), []
    for layer in layers():
        parameters, f = loss(layer)
        if transform == "grad":
            found.append(torch.func.grad(f)(parameters, x))
        elif transform == "vmap of grad":
            found.append(torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))(parameters, torch.stack([x, 2 * x])))
        elif transform == "jvp":
            found.append(torch.func.jvp(lambda p, f=f: f(p, x), (parameters,), (parameters,))[1])
        else:
            found.append(torch.func.hessian(f)(parameters, x)["lora_scaling"]["lora_A"])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_forward_mode_gives_the_loops_result():
    x, t = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    found = []
    for layer in layers():
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert layers()[0](x.requires_grad_()).grad_fn.name() == "MultiLoRAFunctionBackward"


def test_torch_func_of_a_peft_model_and_of_layers_that_share_their_input():
    from peft import get_peft_model

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)

    config = MultiLoraConfig(r=2, lora_num=2, target_modules=["q_proj", "k_proj", "v_proj"], init_weights=False)
    model = get_peft_model(Attention(), config).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    parameters, f = loss(model)
    found = torch.func.grad(f)(parameters, x)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-10, atol=1e-10)


def test_a_seed_gives_the_mask_of_dropout_mask_under_torch_func():
    case = random_case((6, 8), 6, 3, 2, dtype=torch.float64)
    parameters = [case.parameters[name] for name in NAMES]
    options = {"dropout_p": 0.4, "seed": torch.tensor([5])}
    wanted = multilora_linear(case.x, *parameters, **options)
    found = torch.func.jvp(lambda x: multilora_linear(x, *parameters, **options), (case.x,), (case.x,))[0]
    assert not dropout_mask(5, 6, 8, 0.4).all()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("training", "group"), [(True, True), (False, False)])
def test_a_trace_can_be_saved_and_serves_any_number_of_tokens(training, group, recwarn):
    model = nn.ModuleDict({name: MultiLoRALinear(nn.Linear(8, 6), r=2, lora_num=3) for name in ("q_proj", "k_proj")})
    fuse(model)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model if group else nn.ModuleDict({"q_proj": model["q_proj"]})

        def forward(self, x):
            return sum(layer(x) for layer in self.layers.values())

    both = Both().train(training)
    for layer in both.layers.values():
        nn.init.normal_(layer.lora_scaling)
    recwarn.clear()
    traced = torch.jit.trace(both, (torch.randn(3, 8),))
    assert not [w for w in recwarn if issubclass(w.category, torch.jit.TracerWarning)]
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    x = torch.randn(7, 8)
    torch.testing.assert_close(torch.jit.load(stored)(x), both(x))


@pytest.mark.parametrize("group", [False, True])
def test_a_batch_of_gradients_is_refused_in_a_sentence(group):
    model = nn.ModuleDict({name: MultiLoRALinear(nn.Linear(8, 6), r=2, lora_num=3) for name in ("q_proj", "k_proj")})
    fuse(model)
    x = torch.randn(4, 8, requires_grad=True)
    ys = [layer(x) for layer in model.values()] if group else [layers()[0].float()(x)]
    with pytest.raises(RuntimeError, match="takes one gradient"):
        torch.autograd.grad(ys, x, [torch.randn(2, 4, 6) for _ in ys], is_grads_batched=True)
