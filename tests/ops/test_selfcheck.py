"""The self-check of a device's kernels before their first use."""

import pytest
import torch
from product_problem import needs_copy_engine

from multilora_fast import multilora_linear
from multilora_fast.kernels import linear
from multilora_fast.kernels.configs import device_of, product_tile
from multilora_fast.ops import equations, selfcheck
from multilora_fast.ops.backends import load, load_grouped
from multilora_fast.ops.equations import OpSettings


def check(direction, device, dtype=torch.float32, p=0.1, M=1, c=2.0):
    selfcheck._check.cache_clear()
    settings = OpSettings(c, p, dtype, "triton")
    selfcheck.check(direction, torch.zeros(M, 1, device=device), torch.zeros(3, 12, 8, device=device), settings)


@pytest.mark.parametrize(
    ("M", "p", "dtype"), [(1, 0.0, torch.float16), (1, 0.1, torch.float32), (100, 0.1, torch.float16)]
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_right_kernels_pass(direction, M, p, dtype, device):
    check(direction, device, dtype, p, M)


@pytest.mark.parametrize("c", [-0.3, 0.0, 1e6, 1e-9])
def test_a_factor_that_rounds_to_zero_or_infinity_is_not_the_kernels_fault(c, device):
    check("forward", device, torch.float16, p=0.0, c=c)


def off_by_a_percent(function):
    """A product as a wrong kernel would give it."""

    def wrong(*arguments, **options):
        out = function(*arguments, **options)
        if out is None:  # expand works in place
            arguments[0].mul_(1.01)
            return None
        return tuple(t * 1.01 for t in out) if isinstance(out, tuple) else out * 1.01

    return wrong


@pytest.mark.parametrize(
    ("direction", "kernel"),
    [("forward", "shrink"), ("forward", "expand"), *[("backward", k) for k in ("shrink", "expand", "reduce_all")]],
)
def test_a_wrong_kernel_is_named_with_its_error(direction, kernel, device, monkeypatch):
    broken = load("torch")._replace(**{kernel: off_by_a_percent(getattr(load("torch"), kernel))})
    monkeypatch.setattr(selfcheck, "load", lambda name: broken)
    with pytest.raises(RuntimeError, match=rf'kernel {kernel.split("_")[0]}.* is wrong on .*: error .*backend="torch"'):
        check(direction, device, p=0.0)


def test_a_combination_is_checked_once_per_size_class(device, monkeypatch):
    check("forward", device)
    monkeypatch.setattr(selfcheck, "load", lambda name: pytest.fail("checked again"))
    settings = OpSettings(2.0, 0.1, torch.float32, "triton")
    for M in (1, 16):
        selfcheck.check("forward", torch.zeros(M, 1, device=device), torch.zeros(3, 12, 8, device=device), settings)


@pytest.fixture
def joint(monkeypatch, device):
    """The joint kernel as PRODUCT_WINS would choose it, with its check as on a GPU."""
    tile = product_tile(device_of(torch.empty(0, device=device))[0])
    monkeypatch.setattr(linear, "product_config", lambda *layer: tile)
    monkeypatch.setattr(equations, "_is_checked", lambda tokens, settings: settings.backend == "triton")
    monkeypatch.setattr(selfcheck, "check", lambda *_: None)
    selfcheck._check_joint.cache_clear()
    return monkeypatch


def layer_step(device, bias=True, **options):
    sizes = [(9, 24), (16, 24), (16,), (2, 8, 24), (2, 16, 8), (2, 16)]
    tensors = [torch.randn(size, device=device, dtype=torch.float16, requires_grad=True) for size in sizes]
    x, W, b, *branches = tensors
    multilora_linear(x, W, b if bias else None, *branches, **{"backend": "triton", **options}).square().sum().backward()


@needs_copy_engine
@pytest.mark.parametrize("options", [{"scaling_factor": -0.5}, {"bias": False, "dropout_p": 0.3}])
def test_the_right_joint_kernel_passes_and_is_checked_once(joint, device, options):
    layer_step(device, **options)
    assert selfcheck._check_joint.cache_info().misses == 2
    joint.setattr(selfcheck, "_compare", lambda *_: pytest.fail("checked again"))
    layer_step(device, **options)


@needs_copy_engine
@pytest.mark.parametrize("transposed", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize("walks", [False, True])
def test_a_wrong_joint_kernel_is_named_before_it_serves(joint, device, transposed, walks):
    """Also one that is wrong only where a program walks from one tile to the next, in the last tiles."""
    right, served = linear.product, []

    def wrong(x, weight, *arguments, **options):
        served.append(len(x))
        out = right(x, weight, *arguments, **options)
        if options["transposed"] == transposed:
            out[:, -32 if walks else 0 :] *= 1.1 if walks else 1.01
        return out

    joint.setattr(linear, "product", wrong)
    with pytest.raises(RuntimeError, match=r'Triton kernel product.* is wrong on .*: error .*backend="torch"'):
        layer_step(device)
    assert served[-1] == selfcheck.TOKENS["decode"]


@needs_copy_engine
@pytest.mark.parametrize("options", [{"exact_base": True}, {"backend": "torch"}])
def test_a_joint_kernel_that_is_not_chosen_is_not_checked(joint, device, options):
    joint.setattr(linear, "product", lambda *_, **__: pytest.fail("ran"))
    layer_step(device, **options)
    joint.setattr(linear, "product_config", lambda *layer: None)
    layer_step(device)
    assert selfcheck._check_joint.cache_info().misses == 0


@pytest.mark.parametrize(("p", "dtype"), [(0.0, torch.float16), (0.1, torch.float32)])
def test_the_kernels_of_experts_pass(p, dtype, device):
    selfcheck._check_grouped.cache_clear()
    selfcheck.check_grouped(torch.zeros(9, 8, device=device), 3, 6, dtype, OpSettings(2.0, p, dtype, "triton"))


@pytest.mark.parametrize("kernel", ["shrink", "expand", "reduce", "reduce_scaled"])
def test_a_wrong_kernel_of_experts_is_named(kernel, device, monkeypatch):
    exact = load_grouped("torch")
    broken = exact._replace(**{kernel: off_by_a_percent(getattr(exact, kernel))})
    monkeypatch.setattr(selfcheck, "load_grouped", lambda name: broken if name == "triton" else exact)
    selfcheck._check_grouped.cache_clear()
    settings = OpSettings(2.0, 0.0, torch.float32, "triton")
    with pytest.raises(RuntimeError, match=rf"kernel grouped {kernel.split('_')[0]}.* is wrong on"):
        selfcheck.check_grouped(torch.zeros(9, 8, device=device), 3, 6, torch.float32, settings)
