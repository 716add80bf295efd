"""multilora_linear and multilora_add, forward and backward, against the reference loop."""

import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from multilora_fast import dropout_mask, multilora_add, multilora_linear
from multilora_fast.memory import saved_bytes
from multilora_fast.ops.torch_backend import inverse_keep
from multilora_fast.testing import Case, assert_two_times_rule, random_case, run, truth

BACKENDS = ["torch", "triton"]
GRID = [("torch", n, r) for n, r in itertools.product([1, 2, 3, 5], [1, 4, 12, 32])]
IN_THE_INTERPRETER = [("triton", 1, 12), ("triton", 2, 32), ("triton", 3, 4), ("triton", 5, 1)]
LORA = ("lora_A", "lora_B", "lora_scaling")
SCALING = ("vector", "scalar")


def ordered(case):
    return [case.parameters[k] for k in ("weight", "bias", *LORA)]


def op_for(case, p, backend):
    """The op with the case's scaling factor; with dropout, its mask becomes the case's."""
    if p:
        K = case.x.shape[-1]
        mask = dropout_mask(torch.tensor([11], device=case.x.device), case.x.numel() // K, K, p, backend=backend)
        case.factor = mask.double() * inverse_keep(p)
    return partial(multilora_linear, scaling_factor=case.scaling_factor, dropout_p=p, seed=11, backend=backend)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "n", "r"), GRID + IN_THE_INTERPRETER)
def test_float64_equals_the_reference(backend, n, r, p, device):
    if device == "cuda" and backend == "triton":
        pytest.skip("float64 kernels run in the interpreter only")
    case = random_case((3, 7, 37), 23, n, r, dtype=torch.float64, scaling=SCALING[r == 4], device=device)
    ours = run(op_for(case, p, backend), case)
    for name, exact in truth(case).items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("backend", "n", "r"), [*GRID, ("triton", 1, 1), ("triton", 3, 4)])
def test_gradcheck(backend, n, r, p):
    slow = backend == "triton"
    if slow and torch.cuda.is_available():
        pytest.skip("float64 kernels run in the interpreter only")
    case = random_case((3, 5), 3, n, r, dtype=torch.float64, scaling=SCALING[r == 4])
    op = partial(multilora_linear, scaling_factor=0.7, dropout_p=p, seed=5, backend=backend)
    inputs = [t.requires_grad_() for t in (case.x, *ordered(case))]
    assert torch.autograd.gradcheck(op, inputs, fast_mode=slow or n * r > 12)


DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16 x, float32 adapter": (torch.bfloat16, torch.float32),
    "float16 x, float32 adapter": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("p", "scaling"), [(0.0, "scalar"), (0.1, "vector")])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_two_times_rule(dtypes, p, scaling, backend, device):
    dtype, adapter_dtype = DTYPES[dtypes]
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 is wrong in Triton's interpreter")
    case = random_case((2, 33, 72), 48, 3, 12, dtype=dtype, adapter_dtype=adapter_dtype, scaling=scaling, device=device)
    assert_two_times_rule(op_for(case, p, backend), case)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [True, False])
def test_two_times_rule_under_autocast(cast, dtype, p, device):
    case = random_case((2, 33, 72), 48, 3, 12, device=device)
    case.x = case.x.to(dtype if cast else torch.float32)  # as another layer's output is
    assert_two_times_rule(op_for(case, p, None), case, autocast=dtype)


def test_gradients_come_in_the_parameters_dtypes(device):
    case = random_case((4, 16), 8, 2, 4, dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
    leaves = {k: v.requires_grad_() for k, v in case.parameters.items()}
    x = case.x.requires_grad_()
    multilora_linear(x, **leaves).sum().backward()
    assert x.grad.dtype == leaves["weight"].grad.dtype == torch.bfloat16
    assert all(leaves[k].grad.dtype == torch.float32 for k in ("lora_A", "lora_B", "lora_scaling"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_at_step_zero_it_is_the_base_layer(dtype, bias, backend, device):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 is wrong in Triton's interpreter")
    case = random_case((2, 19, 40), 56, 3, 8, dtype=dtype, bias=bias, device=device)
    leaves = {k: v.requires_grad_(k.startswith("lora")) for k, v in case.parameters.items()}
    leaves["lora_scaling"].data.zero_()
    y = multilora_linear(case.x, leaves["weight"], leaves.get("bias"), *map(leaves.get, LORA), backend=backend)
    assert torch.equal(y, F.linear(case.x, leaves["weight"], leaves.get("bias")))
    y.backward(case.dy)
    assert not leaves["lora_A"].grad.any()
    assert not leaves["lora_B"].grad.any()
    assert leaves["lora_scaling"].grad.ne(0).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_mask(reentrant, device):
    case = random_case((2, 9, 32), 24, 3, 4, device=device)
    op = partial(multilora_linear, scaling_factor=2.0, dropout_p=0.5)

    def checkpointed(x, **parameters):
        values = [parameters[k] for k in ("weight", "bias", *LORA)]
        return checkpoint(op, x, *values, use_reentrant=reentrant)

    def gradients(function):
        torch.manual_seed(3)
        return run(function, case)

    ours, plain = gradients(checkpointed), gradients(op)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_layers_save_x_once_an_H_each_and_a_seed(layers, autocast, p, device):
    case = random_case((4, 64, 96), 96, 3, 8, device=device)
    leaves = {k: v.requires_grad_(k.startswith("lora")) for k, v in case.parameters.items()}
    x = case.x.requires_grad_()
    with saved_bytes(leaves.values()) as saved, torch.autocast(device, torch.bfloat16, enabled=autocast):
        outs = [multilora_linear(x, **leaves, dropout_p=p) for _ in range(layers)]
    H = 4 * 64 * 24 * (2 if autocast else 4)
    assert all(y.requires_grad and y.dtype == (torch.bfloat16 if autocast else torch.float32) for y in outs)
    assert 0 <= saved.total - (4 * x.numel() + layers * H) <= layers * 64


def test_saves_nothing_that_no_gradient_needs(device):
    case = random_case((8, 16), 12, 2, 4, device=device)
    with saved_bytes(case.parameters.values()) as saved:
        multilora_linear(case.x, **case.parameters)
        multilora_linear(case.x.clone().requires_grad_(), **case.parameters)
        with torch.no_grad():
            multilora_linear(case.x, *(v.clone().requires_grad_() for v in ordered(case)))
    assert saved.total == 0


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("K", "N"), [(0, 5), (4, 0), (0, 0)])
def test_layers_without_inputs_or_outputs(K, N, backend, p, device):
    full = random_case((3, 4), 5, 2, 3, device=device)
    sizes = {"weight": (N, K), "bias": (N,), "lora_A": (2, 3, K), "lora_B": (2, N, 3), "lora_scaling": (2, N)}
    parameters = {name: full.parameters[name][tuple(map(slice, size))] for name, size in sizes.items()}
    case = Case(full.x[:, :K], full.dy[:, :N], parameters)
    ours = run(partial(multilora_linear, dropout_p=p, seed=11, backend=backend), case)
    for name, exact in truth(case).items():  # no x or no branch is left to drop
        torch.testing.assert_close(ours[name], exact, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(37,), (0, 37), (2, 0, 37), (1, 37), (2, 3, 2, 37)])
def test_leading_dimensions_as_in_nn_linear(shape, backend, device):
    dtype = torch.float64 if backend == "torch" or device == "cpu" else torch.float32
    case = random_case(shape, 23, 2, 4, dtype=dtype, device=device)
    ours = run(op_for(case, 0.0, backend), case)
    assert ours["out"].shape == (*shape[:-1], 23)
    for name, exact in truth(case).items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_add_leaves_y_and_equals_the_linear(p, backend, device):
    dtype = torch.float64 if device == "cpu" else torch.float32
    case = random_case((3, 5, 37), 23, 3, 4, dtype=dtype, device=device)
    linear = op_for(case, p, backend)
    rest = {"scaling_factor": case.scaling_factor, "dropout_p": p, "seed": 11, "backend": backend}

    def added(x, weight, bias, **branches):
        y = F.linear(x, weight, bias)
        before = y.detach().clone()
        out = multilora_add(y, x, **branches, **rest)
        assert torch.equal(y, before)
        return out

    ours, wanted = run(added, case), run(linear, case)
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-5, atol=1e-5 if device == "cuda" else 1e-10)


def test_weight_from_a_function_is_asked_again_in_backward_and_equals_the_dense_one(device):
    case = random_case((3, 5, 37), 23, 3, 4, device=device)
    weight = case.parameters.pop("weight")
    calls = []

    def dense():
        calls.append(1)
        return weight.clone()

    x = case.x.requires_grad_()
    leaves = {k: v.requires_grad_(k != "bias") for k, v in case.parameters.items()}
    with saved_bytes(leaves.values()) as saved:
        y = multilora_linear(x, dense, **leaves)
    assert saved.total <= 4 * (x.numel() + 15 * 12) + 64
    grads = torch.autograd.grad(y, [x, *map(leaves.get, LORA)], case.dy)
    assert len(calls) == 2
    wanted = torch.autograd.grad(multilora_linear(x, weight, **leaves), [x, *map(leaves.get, LORA)], case.dy)
    assert all(map(torch.equal, grads, wanted))


def test_backward_can_be_taken_once(device):
    case = random_case((3, 8), 4, 2, 2, device=device)
    x = case.x.requires_grad_()
    (grad,) = torch.autograd.grad(multilora_linear(x, **case.parameters).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_backward_inside_autocast_keeps_the_dtype_of_forward(device):
    case = random_case((30, 64), 48, 2, 4, device=device)
    x = case.x.requires_grad_()
    grads = []
    for enabled in (False, True):
        y = multilora_linear(x, **case.parameters)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            grads += torch.autograd.grad(y, x, case.dy)
    assert torch.equal(*grads)


def test_meta_tensors_give_shapes():
    case = random_case((3, 5, 37), 23, 3, 4)
    meta = case.map(lambda t: t.to("meta"))
    out = run(partial(multilora_linear, dropout_p=0.1), meta)
    assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in run(multilora_linear, case).items()}
