"""The joint kernel against its formula in float64, in the interpreter where there is no GPU.

The bound is the 2× rule of test_kernels, and outputs are allocated full of NaN there too.
"""

import math

import pytest
import torch
from device import DEVICE
from formulas import ALPHA, P, make, outputs_of_nan, within
from product_problem import Problem, needs_copy_engine, padded
from torch.nn import functional as F

from multilora_fast import multilora_linear
from multilora_fast.kernels import product as module
from multilora_fast.kernels.configs import KernelConfig
from multilora_fast.kernels.product import product

pytestmark = needs_copy_engine
DTYPES = [torch.float16] if DEVICE == "cuda" else [torch.float16, torch.float32, torch.float64]
# M, K, N, n, r
SHAPES = [
    (1, 8, 8, 1, 1), (3, 72, 40, 2, 3), (37, 136, 200, 3, 6), (70, 128, 64, 3, 32),
    (130, 40, 72, 5, 6), (33, 264, 96, 6, 1), (65, 72, 328, 1, 32), (40, 96, 64, 6, 32),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nan_outputs(monkeypatch):
    outputs_of_nan(monkeypatch)


@pytest.mark.parametrize("at", range(len(SHAPES)))
def test_both_directions_agree_with_the_formula(at):
    problem = Problem(SHAPES[at], DTYPES[at % len(DTYPES)], scalar=at % 2 == 0, p=P if at % 4 else 0.0)
    problem.check(problem.forward(), problem.backward())


def test_float32_parameters_with_float16_tokens():
    problem = Problem((37, 40, 72, 3, 6), torch.float16, torch.float32)
    problem.check(problem.forward(), problem.backward())


@pytest.mark.parametrize("tile", [(64, 32), (32, 128)], ids=str)
def test_tiles_agree(tile):
    problem = Problem((70, 136, 200, 3, 8), torch.float16)
    config = KernelConfig(*tile, 4, 2)
    problem.check(problem.forward(config=config), problem.backward(config=config))


def test_many_tiles_walk_in_groups():
    """More groups of rows than one, the last of them cut, and more tiles than programs."""
    problem = Problem((32 * 11 + 5, 24, 72, 2, 8), torch.float16)
    config = KernelConfig(32, 32, 4, 2)
    problem.check(problem.forward(config=config), problem.backward(config=config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_scale_adds_nothing(dtype):
    problem = Problem((37, 72, 40, 3, 6), dtype)
    problem.scale = torch.zeros_like(problem.scale)
    within(problem.forward(), F.linear, problem.x, problem.weight, problem.bias, dtype=dtype)


def test_what_is_dropped_adds_nothing():
    problem = Problem((37, 136, 72, 3, 6), torch.float16)
    problem.mask = torch.zeros_like(problem.mask)
    problem.mask[:, 130] = True
    dx, problem.h = problem.backward(), padded(37, 18, torch.float16).zero_()
    alone = problem.backward()
    assert (dx != alone)[:, 130].any()
    dx[:, 130] = alone[:, 130]
    assert torch.equal(dx, alone)


def test_strided_inputs_and_outputs():
    """Rows of x, W, h and y that lie apart, biases and weights of any strides; nothing beside y is written."""
    problem = Problem((37, 48, 72, 3, 6), torch.float16)
    y, dx = problem.forward(), problem.backward()
    wide = torch.full((37, 136), math.nan, dtype=torch.float16, device=DEVICE)
    problem.x = torch.cat([problem.x, problem.x], 1)[:, 48:]
    problem.dy = torch.cat([problem.dy, problem.dy], 1)[:, 72:]
    problem.weight = torch.cat([problem.weight, problem.weight], 1)[:, 48:]
    problem.h = torch.cat([problem.h[:, :0], padded(37, 8, torch.float16), problem.h, problem.h[:, :6]], 1)[:, 8:26]
    problem.bias, problem.b = problem.bias.repeat_interleave(2)[::2], problem.b.contiguous()
    problem.scale = problem.scale.T.contiguous().T
    assert torch.equal(problem.forward(out=wide[:, 32:104]), y)
    assert torch.equal(wide[:, 32:104], y)
    assert wide[:, :32].isnan().all()
    assert wide[:, 104:].isnan().all()
    assert torch.equal(problem.backward(out=torch.empty_like(dx)), dx)
    lone = problem.x[:1].as_strided((1, 48), (7, 1))
    rest = problem.weight, problem.bias, problem.h[:1], problem.b, problem.scale, ALPHA
    assert torch.equal(product(lone, *rest, transposed=True), y[:1])


def test_columns_that_are_no_multiple_of_anything_in_rows_that_are():
    problem = Problem((5, 24, 24, 2, 3), torch.float16)
    x, weight = problem.x[:, :21], problem.weight[:19, :21]
    b, scale, out = problem.b[:, :, :19], problem.scale[:, :19], torch.empty_like(problem.dy)[:, :19]
    y = product(x, weight, None, problem.h, b, scale, ALPHA, transposed=True, out=out)
    formula = lambda x, weight, h, b, scale: problem.formula_forward(x, weight, 0.0, h, b, scale)  # noqa: E731
    within(y, formula, x, weight, problem.h, b, dtype=torch.float16, factors=(ALPHA * scale.double(),))


def test_a_weight_that_is_already_what_is_read_is_not_packed(monkeypatch):
    problem = Problem((5, 24, 24, 1, 8), torch.float16)
    forward = lambda: product(problem.x, problem.weight, None, problem.h, problem.b, transposed=True)  # noqa: E731
    monkeypatch.setattr(module, "pack", None)
    assert forward().shape == (5, 24)
    assert problem.backward().shape == (5, 24)
    stacked = make(2, 8, 24, dtype=torch.float16)
    h = make(5, 16, dtype=torch.float16)
    assert product(problem.dy, problem.weight, None, h, stacked, transposed=False).shape == (5, 24)
    with pytest.raises(TypeError):  # lora_B of two branches is no matrix
        product(problem.x, problem.weight, None, h, make(2, 24, 8, dtype=torch.float16).mT, transposed=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64")
@pytest.mark.parametrize("p", [0.0, P])
def test_gradients_of_the_op_through_it(p, monkeypatch):
    products = []
    record = lambda *args, **kwargs: products.append(product(*args, **kwargs))  # noqa: E731
    monkeypatch.setattr("multilora_fast.kernels.linear.product_config", lambda *_: KernelConfig(32, 64, 4, 2))
    monkeypatch.setattr("multilora_fast.kernels.linear.product", record)
    M, K, N, n, r = 3, 6, 4, 2, 1
    x, a, b, s = (torch.randn(*size, dtype=torch.float64) for size in ((M, K), (n, r, K), (n, N, r), (n, N)))
    weight, bias = torch.randn(N, K, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    op = lambda x, bias, *t: multilora_linear(x, weight, bias, *t, dropout_p=p, seed=3, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in (x, bias, a, b, s)], fast_mode=True)
    assert len(products) > 2


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 4096, 3, 32), (777, 1024, 2056, 5, 32), (2999, 4104, 1376, 5, 8)], ids=str)
def test_both_directions_on_the_gpu(shape, dtype, p):
    for params in (dtype, torch.float32):
        problem = Problem(shape, dtype, params, p=p)
        problem.check(problem.forward(), problem.backward())


def test_empty_outputs_and_meta_tensors_launch_nothing():
    for M, device in ((0, DEVICE), (3, "meta")):
        sizes = ((M, 16), (24, 16), (24,), (M, 8), (2, 4, 24))
        tensors = [torch.empty(*size, dtype=torch.float16, device=device) for size in sizes]
        assert product(*tensors, transposed=True).shape == (M, 24)
