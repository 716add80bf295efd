"""When layers share an input: what must match for all of them, and when outputs not taken are dropped."""

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from multilora_fast import MultiLoRALinear, fuse
from multilora_fast.layers import shared_input

NAMES = ("q_proj", "k_proj", "v_proj")


def projections(p=0.0) -> nn.ModuleDict:
    model = nn.ModuleDict({name: MultiLoRALinear(nn.Linear(8, 8), r=2, lora_num=2, lora_dropout=p) for name in NAMES})
    for layer in model.values():
        nn.init.normal_(layer.lora_scaling)
    fuse(model)
    return model


def group_of(model: nn.ModuleDict) -> shared_input.SharedInput:
    return model["q_proj"].shared


def alone(layer, x):
    shared, layer.shared = layer.shared, None
    out = layer(x)
    layer.shared = shared
    return out


def forward(model, x):
    return sum(layer(x) for layer in model.values())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "lora_B", "lora_scaling", "replaced", "factor"])
def test_a_member_that_changed_since_computes_anew(name, grad):
    model, x = projections(), torch.randn(3, 8)
    member = model["k_proj"]
    with torch.set_grad_enabled(grad):
        model["q_proj"](x)
        if name == "replaced":
            member.lora_B = nn.Parameter(torch.randn(2, 8, 2))
        elif name == "factor":
            member.scaling_factor *= 2
        else:
            with torch.no_grad():
                getattr(member, name).add_(1.0)
        assert torch.equal(member(x), alone(member, x))


def test_x_that_changed_in_place_is_another_x():
    model, x = projections(), torch.ones(3, 8)
    model["q_proj"](x)
    x.mul_(3)
    assert torch.equal(model["k_proj"](x), alone(model["k_proj"], x))


def test_two_autocast_dtypes_for_one_x():
    model, x = projections(), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model["q_proj"](x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert model["k_proj"](x).dtype == torch.float16
    assert model["v_proj"](x).dtype == torch.float32


def test_with_and_without_a_graph_for_one_x():
    model, x = projections(), torch.randn(3, 8)
    with torch.no_grad():
        assert not model["q_proj"](x).requires_grad
    assert model["k_proj"](x).requires_grad


def test_tensors_of_inference_are_not_shared(served):
    model = projections()
    with torch.inference_mode():
        forward(model, torch.randn(3, 8))
    assert not served


def test_layers_that_save_their_input_in_two_ways_do_not_share(served):
    model, x = projections(), torch.randn(3, 8)
    model["k_proj"].save_inputs = "fp8"
    forward(model, x)
    assert not served


@pytest.mark.parametrize("grad", [True, False])
def test_an_output_that_nobody_took_keeps_nothing_alive(grad):
    model, x = projections(), torch.randn(3, 8, requires_grad=True)
    with torch.set_grad_enabled(grad):
        out = model["q_proj"](x).sum()
    waiting = [weakref.ref(out) for out, *_ in group_of(model)._thread.waiting.outputs.values()]
    if grad:
        out.backward()
    here = weakref.ref(x)
    del x, out
    gc.collect()
    assert here() is None
    assert len(waiting) == 2
    assert all(left() is None for left in waiting)


def test_an_unused_layer_has_no_gradient_and_not_a_zero_one():
    model, x = projections(), torch.randn(3, 8)
    outs = [layer(x) for layer in model.values()]
    (outs[0] + outs[2]).sum().backward()
    assert model["k_proj"].lora_A.grad is None
    assert model["k_proj"].lora_B.grad is None
    assert model["k_proj"].lora_scaling.grad is None
    assert model["v_proj"].lora_A.grad is not None


def test_threads_that_share_a_model_do_not_meet(served):
    model, errors = projections(), []
    wanted = forward(model, torch.ones(3, 8))

    def work():
        try:
            for _ in range(10):
                torch.testing.assert_close(forward(model, torch.ones(3, 8)), wanted)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert served == [3] * 41
    assert group_of(model).disabled_reason is None


def test_a_group_returns_after_forwards_that_failed(served):
    model = projections()
    for _ in range(5):
        model["q_proj"](torch.randn(3, 8))
    assert group_of(model).disabled_reason
    served.clear()
    forward(model, torch.randn(3, 8)).sum().backward()
    assert not served
    forward(model, torch.randn(3, 8)).sum().backward()
    assert served == [3]
    assert group_of(model).disabled_reason is None


def test_a_forward_now_and_then_that_fails_does_not_end_a_group(served):
    model = projections()
    for _ in range(4):
        model["q_proj"](torch.randn(3, 8))
        forward(model, torch.randn(3, 8)).sum().backward()
    assert group_of(model).disabled_reason is None
    assert served == [3] * 8


def test_a_layer_that_is_never_called_ends_the_group_for_good(served):
    model = projections()
    for _ in range(5):
        x = torch.randn(3, 8)
        (model["q_proj"](x) + model["v_proj"](x)).sum().backward()
    assert group_of(model).disabled_reason
    assert len(served) == 2


def test_parameters_that_zero_gathers_are_not_shared(served):
    model = projections()
    forward(model, torch.randn(3, 8))
    assert served == [3]
    for p in model.parameters():
        p.ds_id = 7
    forward(model, torch.randn(3, 8))
    assert served == [3]


def test_hooks_may_be_builtins(served):
    """Which belong to no module."""
    model, x = projections(), torch.randn(3, 8)
    with torch.autograd.graph.saved_tensors_hooks(torch.ones(()).mul, torch.clone):
        out = forward(model, x)
    out.sum().backward()
    assert served == [3]


@pytest.mark.parametrize("every", [False, True])
def test_hooks_that_recompute_nothing_let_a_group_end(every, served):
    """As of offloading or a profiler of memory, once or at every step."""
    model = projections()

    def step():
        sum(layer(torch.randn(3, 8, requires_grad=True)).sum() for layer in model.values()).backward()

    with torch.autograd.graph.save_on_cpu():
        forward(model, torch.randn(3, 8)).sum().backward()
    for _ in range(5):
        with torch.autograd.graph.save_on_cpu() if every else nullcontext():
            step()
    assert group_of(model).disabled_reason
    assert len(served) == 2
