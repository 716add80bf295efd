"""The self-check of a device's kernels before their first use."""

import pytest
import torch

from multilora_fast.ops import selfcheck
from multilora_fast.ops.backends import load, load_grouped
from multilora_fast.ops.equations import OpSettings


def check(direction, device, dtype=torch.float32, p=0.1, M=1):
    selfcheck._check.cache_clear()
    settings = OpSettings(2.0, p, dtype, "triton")
    selfcheck.check(direction, torch.zeros(M, 1, device=device), torch.zeros(3, 12, 8, device=device), settings)


@pytest.mark.parametrize(
    ("M", "p", "dtype"), [(1, 0.0, torch.float16), (1, 0.1, torch.float32), (100, 0.1, torch.float16)]
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_right_kernels_pass(direction, M, p, dtype, device):
    check(direction, device, dtype, p, M)


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
