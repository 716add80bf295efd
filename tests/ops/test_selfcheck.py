"""The check that a device's kernels pass before they are used."""

import pytest
import torch

from multilora_fast.ops import selfcheck
from multilora_fast.ops.backends import load, load_grouped
from multilora_fast.ops.equations import OpSettings

DIRECTIONS = ["forward", "backward"]


def check(direction, device, dtype, p=0.1, M=100):
    selfcheck._check.cache_clear()
    settings = OpSettings(2.0, p, dtype, "triton")
    selfcheck.check(direction, torch.zeros(M, 1, device=device), torch.zeros(3, 12, 8, device=device), settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("M", [1, 100])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_right_kernels_pass(direction, M, p, dtype, device):
    check(direction, device, dtype, p, M)


def off_by_a_percent(function):
    def wrong(*arguments, **options):
        out = function(*arguments, **options)
        if out is None:  # expand works in place
            arguments[0].mul_(1.01)
            return None
        return tuple(t * 1.01 for t in out) if isinstance(out, tuple) else out * 1.01

    return wrong


@pytest.mark.parametrize("kernel", ["shrink", "expand", "reduce", "reduce_scaled"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_kernel_is_named_with_its_error(direction, kernel, device, monkeypatch):
    if direction == "forward" and kernel.startswith("reduce"):
        pytest.skip("forward launches no reduce")
    broken = load("triton")._replace(**{kernel: off_by_a_percent(getattr(load("triton"), kernel))})
    monkeypatch.setattr(selfcheck, "load", lambda name: broken)
    with pytest.raises(RuntimeError, match=rf'kernel {kernel.split("_")[0]}.* is wrong on .*: error .*backend="torch"'):
        check(direction, device, torch.float32)


def test_a_combination_is_checked_once_per_size_class(device, monkeypatch):
    check("forward", device, torch.float32)
    monkeypatch.setattr(selfcheck, "load", lambda name: pytest.fail("checked again"))
    settings = OpSettings(2.0, 0.1, torch.float32, "triton")
    for M in (100, 512):
        selfcheck.check("forward", torch.zeros(M, 1, device=device), torch.zeros(3, 12, 8, device=device), settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_kernels_of_experts_pass(p, dtype, device):
    selfcheck._check_grouped.cache_clear()
    selfcheck.check_grouped(torch.zeros(9, 8, device=device), 3, 6, dtype, OpSettings(2.0, p, dtype, "triton"))


@pytest.mark.parametrize("kernel", ["shrink", "expand", "reduce", "reduce_scaled"])
def test_a_wrong_kernel_of_experts_is_named(kernel, device, monkeypatch):
    ours, exact = load_grouped("triton"), load_grouped("torch")
    broken = ours._replace(**{kernel: off_by_a_percent(getattr(ours, kernel))})
    monkeypatch.setattr(selfcheck, "load_grouped", lambda name: broken if name == "triton" else exact)
    selfcheck._check_grouped.cache_clear()
    settings = OpSettings(2.0, 0.1, torch.float32, "triton")
    with pytest.raises(RuntimeError, match=rf"kernel grouped {kernel.split('_')[0]}.* is wrong on"):
        selfcheck.check_grouped(torch.zeros(9, 8, device=device), 3, 6, torch.float32, settings)
