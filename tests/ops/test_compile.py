"""The op under torch.compile: one graph, exact, and one dropout mask in forward, recomputation and backward."""

import operator
import shutil
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from multilora_fast import FusedMultiLoRALinear, MultiLoraConfig, multilora_add, multilora_linear
from multilora_fast.ops.compile import compiled, compiled_backward
from multilora_fast.testing import assert_two_times_rule, random_case

BACKENDS = ["torch", "triton"]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("add", [False, True])
def test_opcheck(add, p, backend, device):
    case = random_case((2, 5, 24), 16, 2, 4, device=device)
    v = {k: t.requires_grad_() for k, t in case.parameters.items()}
    base = (case.dy.requires_grad_(), None, None) if add else (None, v["weight"], v["bias"])
    seed = torch.tensor([7], device=device)
    branches = (v["lora_A"], v["lora_B"], v["lora_scaling"])
    arguments = (case.x.requires_grad_(), *base, *branches, seed, 2.0, p, torch.float32, backend)
    torch.library.opcheck(compiled, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", ["vector", "scalar"])
def test_opcheck_of_backward_in_half_precision(scaling, backend, device):
    case = random_case((3, 24), 16, 2, 4, dtype=torch.float16, scaling=scaling, device=device)
    v = case.parameters
    H = torch.randn(3, 8, dtype=torch.float16, device=device)
    branches = (v["lora_A"], v["lora_B"], v["lora_scaling"])
    settings = (2.0, 0.0, torch.float16, backend)
    torch.library.opcheck(compiled_backward, (case.dy, case.x, H, v["weight"], *branches, None, *settings, [True] * 6))


@needs_compiler
def test_compiled_gradients_of_scales_in_half_precision_add_up(device):
    case = random_case((9, 24), 16, 2, 4, dtype=torch.float16, device=device)
    v = {k: t.requires_grad_() for k, t in case.parameters.items()}

    def twice(x, weight, bias, lora_A, lora_B, lora_scaling):
        once = partial(multilora_linear, x, weight, bias, lora_A, lora_B)
        return once(lora_scaling * 2) + once(lora_scaling)

    found = []
    for op in (twice, torch.compile(twice, fullgraph=True)):
        op(case.x, **v).backward(case.dy)
        found.append(v["lora_scaling"].grad)
        v["lora_scaling"].grad = None
    torch.testing.assert_close(*found, rtol=5e-3, atol=5e-3)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_in_one_graph_and_exact(dtype, device):
    case = random_case((2, 33, 72), 48, 3, 12, dtype=dtype, adapter_dtype=torch.float32, device=device)
    op = torch.compile(partial(multilora_linear, scaling_factor=case.scaling_factor), fullgraph=True)
    assert_two_times_rule(op, case)


def test_scaling_factors_that_differ_stay_in_one_graph(device):
    """From the second one on the compiler sees a symbol."""
    case = random_case((9, 24), 16, 2, 4, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def op(c):
        return multilora_linear(case.x, **case.parameters, scaling_factor=c)

    for c in (1.0, 0.25, -3.0):
        torch.testing.assert_close(op(c), multilora_linear(case.x, **case.parameters, scaling_factor=c))


@pytest.mark.parametrize("c", [1.0, 2.0])
def test_a_constant_scaling_factor_is_no_product(c, device):
    """It would be a kernel of its own, and one by 1 inside of a checkpoint fails to compile on torch 2.14 and 2.15."""
    torch.compiler.reset()  # a second value would be a symbol
    case, graphs = random_case((9, 24), 16, 2, 4, device=device), CompileCounterWithBackend("eager")
    op = partial(multilora_linear, case.x, **case.parameters, scaling_factor=c)
    torch.compile(op, fullgraph=True, backend=graphs)()
    called = [node.target for node in graphs.graphs[0].graph.nodes if node.op == "call_function"]
    assert operator.mul not in called
    assert called


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exported_program_can_be_trained_after_its_decompositions(backend, device):
    layer = FusedMultiLoRALinear(nn.Linear(24, 16), r=4, lora_num=2).to(device)
    layer.backend = backend
    nn.init.normal_(layer.lora_scaling)
    case = random_case((3, 24), 16, 2, 4, device=device)
    exported = torch.export.export(layer, (case.x,)).run_decompositions().module()
    wanted, found = [
        torch.autograd.grad(module(case.x), [module.get_parameter(f"lora_{name}") for name in ("A", "B")], case.dy)
        for module in (layer, exported)
    ]
    torch.testing.assert_close(found, wanted)


def test_compiled_add_in_one_graph(device):
    case = random_case((2, 9, 24), 16, 2, 4, device=device)

    def both(x, weight, bias, **branches):
        return multilora_add(nn.functional.linear(x, weight, bias), x, **branches, scaling_factor=2.0)

    assert_two_times_rule(torch.compile(both, fullgraph=True, backend="aot_eager"), case)


def linear_in_dropout(device):
    """A layer that passes x through dropout and nothing else: y = dropout(x), dx = mask/(1−p) ⊙ dy."""
    layer = FusedMultiLoRALinear(nn.Linear(64, 64, bias=False), r=64, lora_num=1, lora_dropout=0.5).to(device)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(64))
        layer.lora_B.copy_(torch.eye(64))
        layer.lora_scaling.fill_(1.0)
    return layer


@needs_compiler
@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_mask_in_forward_recomputation_and_backward(checkpointed, device):
    layer = linear_in_dropout(device)
    step = partial(checkpoint, layer, use_reentrant=False) if checkpointed else layer
    step = torch.compile(step, fullgraph=True)
    masks = []
    for _ in range(2):
        x = torch.ones(32, 64, device=device, requires_grad=True)
        layer.zero_grad()
        y = step(x)
        y.sum().backward()
        assert set(y.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(x.grad, y)  # dx's mask is the forward's
        assert torch.equal(layer.lora_A.grad[0], y.sum(0).expand(64, 64))  # and so is dA's
        masks.append(y.detach())
    assert not torch.equal(*masks)


def test_a_weight_from_a_function_runs_outside_the_graph(device):
    case = random_case((2, 9, 24), 16, 2, 4, device=device)
    weight = case.parameters.pop("weight")

    def op(x, **parameters):
        return multilora_linear(x, lambda: weight, **parameters)

    wanted = op(case.x, **case.parameters)
    torch.testing.assert_close(torch.compile(op, backend="eager")(case.x, **case.parameters), wanted)
    torch.compiler.reset()
    with pytest.raises((torch._dynamo.exc.Unsupported, ValueError)):
        torch.compile(op, backend="eager", fullgraph=True)(case.x, **case.parameters)


@pytest.mark.parametrize(("dynamic", "autocast", "p"), [(None, False, 0.0), (True, True, 0.1)])
def test_token_counts_cost_no_more_graphs_than_with_lora(dynamic, autocast, p):
    def graphs(model) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled_model = torch.compile(model, backend=counter, dynamic=dynamic)
        for tokens in (3, 4, 5):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                compiled_model(torch.randn(2, tokens, 8)).sum().backward()
        return counter.frame_count

    def adapted(config):
        return get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), config)

    options = {"r": 2, "target_modules": ["0", "2"], "lora_dropout": p}
    lora = graphs(adapted(LoraConfig(**options)))
    assert graphs(adapted(MultiLoraConfig(**options))) <= lora
    assert graphs(FusedMultiLoRALinear(nn.Linear(8, 8), r=2, lora_num=2, lora_dropout=p)) <= lora


def test_double_backward_is_refused(device):
    case = random_case((3, 8), 4, 2, 2, device=device)
    x = case.x.requires_grad_()
    v = case.parameters
    out, _ = compiled(
        x, None, v["weight"], v["bias"], v["lora_A"], v["lora_B"], v["lora_scaling"], None, 1.0, 0.0, x.dtype, "torch"
    )
    (grad,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
