"""multilora_linear and multilora_add, forward and backward, against the reference loop."""

import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from multilora_fast import dropout_mask, multilora_add, multilora_linear
from multilora_fast.memory import saved_bytes
from multilora_fast.testing import assert_two_times_rule, random_case, run, truth

BACKENDS = ["torch", "triton"]
GRID = list(itertools.product([1, 2, 3, 5], [1, 4, 12, 32]))
ODD = ((3, 7, 37), 23)  # x (3, 7, K = 37), N = 23


def keep_factor(seed, M, K, p, backend, device):
    cut = round(65536 * p)
    mask = dropout_mask(torch.tensor([seed], device=device), M, K, p, backend=backend)
    return mask.double() * 65536 / (65536 - cut)


def with_dropout(case, p, backend, seed=11):
    K = case.x.shape[-1]
    case.factor = keep_factor(seed, case.x.numel() // K, K, p, backend, case.x.device)
    return partial(multilora_linear, scaling_factor=case.scaling_factor, dropout_p=p, seed=seed, backend=backend)


def op_for(case, p, backend):
    if p:
        return with_dropout(case, p, backend)
    return partial(multilora_linear, scaling_factor=case.scaling_factor, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("n", "r"), GRID)
def test_float64_equals_the_reference(n, r, p, backend, device):
    if device == "cuda" and backend == "triton":
        pytest.skip("float64 kernels run in the interpreter only")
    case = random_case(*ODD, n, r, dtype=torch.float64, scaling="scalar" if r == 4 else "vector", device=device)
    ours = run(op_for(case, p, backend), case)
    for name, exact in truth(case).items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("n", "r"), GRID)
def test_gradcheck(n, r, p, backend):
    slow = backend == "triton"
    if slow and torch.cuda.is_available():
        pytest.skip("float64 kernels run in the interpreter only")
    if slow and (n, r) not in {(1, 1), (3, 4)}:
        pytest.skip("a few cases through the interpreter are enough beside the float64 comparison")
    case = random_case((3, 5), 3, n, r, dtype=torch.float64, scaling="scalar" if r == 4 else "vector")
    names = ["weight", "bias", "lora_A", "lora_B", "lora_scaling"]
    inputs = [case.x, *(case.parameters[k] for k in names)]
    op = partial(multilora_linear, scaling_factor=0.7, dropout_p=p, seed=5, backend=backend)
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in inputs], fast_mode=slow or n * r > 12)


DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16 x, float32 adapter": (torch.bfloat16, torch.float32),
    "float16 x, float32 adapter": (torch.float16, torch.float32),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", ["vector", "scalar"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_two_times_rule(dtypes, p, scaling, backend, device):
    dtype, adapter_dtype = DTYPES[dtypes]
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 is wrong in Triton's interpreter")
    case = random_case((2, 33, 72), 48, 3, 12, dtype=dtype, adapter_dtype=adapter_dtype, scaling=scaling, device=device)
    assert_two_times_rule(op_for(case, p, backend), case)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_times_rule_under_autocast(dtype, p, device):
    case = random_case((2, 33, 72), 48, 3, 12, device=device)
    assert_two_times_rule(op_for(case, p, None), case, autocast=dtype)


def test_autocast_casts_whatever_dtypes_meet(device):
    case = random_case((2, 33, 72), 48, 3, 12, device=device)
    case.x = case.x.to(torch.bfloat16)  # another layer's output
    assert_two_times_rule(op_for(case, 0.0, None), case, autocast=torch.bfloat16)


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


LORA = ("lora_A", "lora_B", "lora_scaling")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_mask(reentrant, device):
    case = random_case((2, 9, 32), 24, 3, 4, device=device)
    op = partial(multilora_linear, scaling_factor=2.0, dropout_p=0.5)

    def checkpointed(x, **parameters):
        names = list(parameters)
        return checkpoint(lambda x, *values: op(x, **dict(zip(names, values, strict=True))), x, *parameters.values(),
                          use_reentrant=reentrant)  # fmt: skip

    def gradients(function):
        torch.manual_seed(3)
        x = case.x.detach().requires_grad_()
        leaves = {k: v.detach().requires_grad_() for k, v in case.parameters.items()}
        function(x, **leaves).backward(case.dy)
        return [x.grad, *(v.grad for v in leaves.values())]

    for ours, plain in zip(gradients(checkpointed), gradients(op), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_for_backward_is_x_and_H_and_a_seed(p, device):
    case = random_case((4, 64, 96), 128, 3, 8, device=device)
    leaves = {k: v.requires_grad_(k.startswith("lora")) for k, v in case.parameters.items()}
    x = case.x.requires_grad_()
    with saved_bytes(leaves.values()) as saved:
        y = multilora_linear(x, **leaves, dropout_p=p)
    assert y.requires_grad
    assert 0 <= saved.total - 4 * (x.numel() + 4 * 64 * 24) <= 64


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("autocast", [False, True])
def test_q_k_and_v_save_their_x_once(autocast, p, device):
    case = random_case((4, 64, 96), 96, 3, 8, device=device)
    leaves = {k: v.requires_grad_(k.startswith("lora")) for k, v in case.parameters.items()}
    x = case.x.requires_grad_()
    with saved_bytes(leaves.values()) as saved, torch.autocast(device, torch.bfloat16, enabled=autocast):
        q, k, v = (multilora_linear(x, **leaves, dropout_p=p) for _ in range(3))
    H = 4 * 64 * 24 * (2 if autocast else 4)
    assert q.dtype == k.dtype == v.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert 0 <= saved.total - (4 * x.numel() + 3 * H) <= 3 * 64


def test_saves_nothing_that_no_gradient_needs(device):
    case = random_case((8, 16), 12, 2, 4, device=device)
    with saved_bytes(case.parameters.values()) as saved:
        multilora_linear(case.x, **case.parameters)
        multilora_linear(case.x.clone().requires_grad_(), **case.parameters)
        with torch.no_grad():
            multilora_linear(case.x, *(v.clone().requires_grad_() for v in ordered(case)))
    assert saved.total == 0


def ordered(case):
    return [case.parameters[k] for k in ("weight", "bias", *LORA)]


@pytest.mark.parametrize("wanted", [("x",), ("bias",), ("weight", "lora_scaling"), ("lora_A",), ("lora_B", "x")])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_each_gradient_alone(wanted, p, device):
    case = random_case((5, 11), 7, 2, 3, dtype=torch.float64, device=device)
    op, exact = op_for(case, p, "torch"), None
    exact = truth(case)
    leaves = {"x": case.x, **case.parameters}
    out = op(**{k: v.requires_grad_(k in wanted) for k, v in leaves.items()})
    for name, grad in zip(wanted, torch.autograd.grad(out, [leaves[k] for k in wanted], case.dy), strict=True):
        torch.testing.assert_close(grad, exact[name], rtol=1e-10, atol=1e-10)


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
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strided_inputs(layout, backend, device):
    case = random_case((6, 4, 32), 24, 2, 4, device=device)
    case.x = {
        "transposed": case.x.transpose(0, 1),
        "sliced": case.x.repeat(1, 1, 2)[..., ::2],
        "expanded": case.x[:, :1].expand(6, 4, 32),
    }[layout]
    case.dy = case.dy.transpose(0, 1) if layout == "transposed" else case.dy[:, :1].expand(6, 4, 24)
    assert_two_times_rule(op_for(case, 0.2, backend), case)


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
