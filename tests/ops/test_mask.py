"""The dropout mask: seeds, rate, and the torch backend's mask on a GPU."""

from functools import partial

import numpy as np
import pytest
import torch
from device import DEVICE

from multilora_fast import dropout_mask, multilora_linear
from multilora_fast.ops import torch_backend
from multilora_fast.testing import random_case

BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fixed_seed_fixes_the_mask_and_a_fresh_one_changes_it(backend, device):
    case = random_case((6, 16), 8, 2, 4, device=device)
    op = partial(multilora_linear, case.x, **case.parameters, dropout_p=0.5, backend=backend)
    assert torch.equal(op(seed=3), op(seed=torch.tensor([3], device=device)))
    assert not torch.equal(op(seed=3), op(seed=4))
    assert not torch.equal(op(), op())
    torch.manual_seed(1)
    first = op()
    torch.manual_seed(1)
    assert torch.equal(op(), first)
    assert torch.equal(op(seed=3, training=False), multilora_linear(case.x, **case.parameters, backend=backend))


def test_a_draw_that_equals_the_threshold_is_kept():
    draws = np.random.SFC64(7).random_raw(5).view(np.int16)[:16].astype(int) + 32768
    mask = dropout_mask(torch.tensor([7]), 1, 16, int(draws[0]) / 65536, backend="torch")[0]
    assert mask.tolist() == (draws >= draws[0]).tolist()
    assert mask[0]
    assert dropout_mask(3, 4, 5, 0.0, backend="torch").all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_on_a_gpu_torch_draws_the_mask_of_the_kernels(dtype, monkeypatch):
    """Here the kernel runs in the interpreter, for a seed that says it is on a GPU."""

    class Elsewhere(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(
        "multilora_fast.kernels.dropout.launch", lambda seed, kernel, grid, **rest: kernel[grid](**rest)
    )
    seed = torch.tensor([1234567], device=DEVICE)
    mask = torch_backend.dropout_mask(seed.as_subclass(Elsewhere), 7, 37, 0.3, dtype).as_subclass(torch.Tensor)
    assert mask.dtype == dtype
    assert torch.equal(mask.bool(), dropout_mask(seed, 7, 37, 0.3, backend="triton"))
