"""The joint kernel against its formula in float64, in the interpreter where there is no GPU.

The bound is the 2× rule of test_kernels, and outputs are allocated full of NaN there too.
"""

import math

import pytest
import torch
from device import DEVICE
from formulas import ALPHA, P, make, outputs_of_nan, within
from product_problem import Problem, needs_copy_engine, packed_bits, padded
from torch.nn import functional as F

from multilora_fast.kernels import product as module
from multilora_fast.kernels.configs import KernelConfig
from multilora_fast.kernels.dropout import drop_threshold
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.product import product

pytestmark = needs_copy_engine
DTYPES = [torch.float16] if DEVICE == "cuda" else [torch.float16, torch.float32, torch.float64]
# M, K, N, n, r
SHAPES = [
    (1, 8, 8, 1, 1),
    (3, 72, 40, 2, 3),
    (37, 136, 200, 3, 6),
    (70, 128, 64, 3, 32),
    (130, 40, 72, 5, 6),
    (33, 264, 96, 6, 1),
    (65, 72, 328, 1, 32),
    (40, 96, 64, 6, 32),
]


@pytest.fixture(autouse=True)
def nan_outputs(monkeypatch):
    outputs_of_nan(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_directions_agree_with_the_formula(shape, dtype):
    index = SHAPES.index(shape)
    problem = Problem(shape, dtype, scalar=index % 2 == 0, p=P if index % 3 else 0.0)
    problem.check(problem.forward(), problem.backward())


@pytest.mark.parametrize("p", [0.0, P])
def test_float32_parameters_with_float16_tokens(p):
    problem = Problem((37, 136, 72, 3, 6), torch.float16, torch.float32, p=p)
    problem.check(problem.forward(), problem.backward())


@pytest.mark.parametrize("tile", [(32, 32), (64, 32), (32, 128)], ids=str)
def test_tiles_agree(tile):
    problem = Problem((70, 136, 200, 3, 8), torch.float16)
    config = KernelConfig(*tile, 4, 2)
    problem.check(problem.forward(config=config), problem.backward(config=config))


def test_many_tiles_walk_in_groups():
    """More groups of rows than one, the last of them cut, and more tiles than programs."""
    problem = Problem((32 * 11 + 5, 24, 72, 2, 8), torch.float16)
    config = KernelConfig(32, 32, 4, 2)
    problem.check(problem.forward(config=config), problem.backward(config=config))


@pytest.mark.skipif(DEVICE != "cpu", reason="float64")
def test_the_same_as_expand_and_the_product_apart():
    problem = Problem((37, 136, 72, 3, 6), torch.float64, p=0.0)
    y, dx = torch.empty(37, 72, dtype=torch.float64), torch.empty(37, 136, dtype=torch.float64)
    expand(y, problem.h, problem.b, problem.scale, ALPHA, accumulate=False)
    y.addmm_(problem.x, problem.weight.T).add_(problem.bias)
    expand(dx, problem.h, problem.a, accumulate=False)
    dx.addmm_(problem.dy, problem.weight)
    torch.testing.assert_close((problem.forward(), problem.backward()), (y, dx))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_scale_gives_the_bits_of_no_branches(dtype):
    problem = Problem((37, 136, 72, 3, 6), dtype)
    problem.scale = torch.zeros_like(problem.scale)
    alone = product(problem.x, problem.weight, problem.bias, transposed=True)
    assert torch.equal(problem.forward(), alone)
    within(alone, F.linear, problem.x, problem.weight, problem.bias, dtype=dtype)
    problem.h = torch.zeros(37, 24, dtype=dtype, device=DEVICE)[:, :18]
    assert torch.equal(problem.backward(), product(problem.dy, problem.weight, transposed=False))


def test_what_is_dropped_adds_nothing():
    problem = Problem((37, 136, 72, 3, 6), torch.float16)
    problem.mask = torch.zeros_like(problem.mask)
    problem.mask[:, 130] = True
    alone, dx = product(problem.dy, problem.weight, transposed=False), problem.backward()
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
    whole = product(problem.x, problem.weight, transposed=True)
    assert torch.equal(product(lone, problem.weight, transposed=True), whole[:1])


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


def test_same_inputs_give_the_same_bits():
    problem = Problem((130, 136, 72, 3, 6), torch.float16)
    assert torch.equal(problem.forward(), problem.forward())
    assert torch.equal(problem.backward(), problem.backward())


class Layer(torch.autograd.Function):
    """y = x Wᵀ + b + (x Ãᵀ) B̃ᵀ with the branches masked in dx alone, H given."""

    @staticmethod
    def forward(ctx, x, weight, bias, h, w, scale):
        ctx.save_for_backward(x, weight, h, w, scale)
        return product(x, weight, bias, h, w, scale, ALPHA, transposed=True)

    @staticmethod
    def backward(ctx, dy):
        x, weight, h, w, scale = ctx.saved_tensors
        scaled = (ALPHA * scale[:, None] * w).flatten(0, 1)
        dw = (dy.T @ h).T.reshape(w.shape)
        return (
            product(dy.contiguous(), weight, transposed=False), product(dy.T.contiguous(), x, transposed=False),
            dy.sum(0), product(dy.contiguous(), scaled.T.contiguous(), transposed=False),
            ALPHA * scale[:, None] * dw, ALPHA * (w * dw).sum(1),
        )  # fmt: skip


class Masked(torch.autograd.Function):
    """dy W + mask/(1−p) ⊙ (dH Ã), linear in each of its inputs."""

    @staticmethod
    def forward(ctx, dy, weight, dh, a, mask):
        ctx.save_for_backward(dy, weight, dh, a, mask)
        return product(dy, weight, None, dh, a, bits=packed_bits(mask), p=P, transposed=False)

    @staticmethod
    def backward(ctx, g):
        dy, weight, dh, a, mask = ctx.saved_tensors
        kept = g * mask * torch.tensor(65536 / (65536 - drop_threshold(P)), dtype=g.dtype)
        flat, g = a.flatten(0, 1), g.contiguous()
        return (
            product(g, weight, transposed=True), product(dy.T.contiguous(), g, transposed=False),
            product(kept, flat, transposed=True), (dh.T @ kept).reshape(a.shape), None,
        )  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="float64")
def test_gradients():
    M, K, N, n, r = 4, 6, 4, 2, 1
    grad = lambda *size: torch.randn(*size, dtype=torch.float64, requires_grad=True)  # noqa: E731
    assert torch.autograd.gradcheck(
        Layer.apply, (grad(M, K), grad(N, K), grad(N), grad(M, n * r), grad(n, r, N), grad(n, N))
    )
    mask = torch.rand(M, K) >= P
    assert torch.autograd.gradcheck(
        lambda *t: Masked.apply(*t, mask), (grad(M, N), grad(N, K), grad(M, n * r), grad(n, r, K))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 4096, 3, 32), (777, 1024, 2056, 5, 32), (2999, 4104, 1376, 5, 8)], ids=str)
def test_both_directions_on_the_gpu(shape, dtype, p):
    for params in (dtype, torch.float32):
        problem = Problem(shape, dtype, params, p=p)
        problem.check(problem.forward(), problem.backward())


def test_empty_outputs_and_meta_tensors_launch_nothing():
    x, weight = make(0, 16, dtype=torch.float16), make(24, 16, dtype=torch.float16)
    assert product(x, weight, transposed=True).shape == (0, 24)
    x, weight = x.new_empty((3, 16), device="meta"), weight.to("meta")
    assert product(x, weight, transposed=True).shape == (3, 24)
