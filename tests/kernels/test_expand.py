"""What expand does beside its sum: it writes or adds, keeps bits where there is nothing, keeps its weight or not."""

import math

import pytest
import torch
from device import DEVICE
from formulas import ALPHA, P, expanded, mask_of, outputs_of_nan, problem, within

from multilora_fast.kernels.configs import KernelConfig
from multilora_fast.kernels.expand import expand


@pytest.fixture(autouse=True)
def nan_outputs(monkeypatch):
    outputs_of_nan(monkeypatch)


ZEROS = [(torch.float32, 0.0, 16), (torch.float32, -0.0, 256), (torch.float16, -0.0, 16), (torch.float16, 0.0, 256)]
ZEROS += [pytest.param(torch.bfloat16, 0.0, columns, marks=pytest.mark.gpu) for columns in (16, 256)]


@pytest.mark.parametrize(("dtype", "zero", "columns"), ZEROS, ids=str)
def test_a_zero_scale_leaves_the_bits_of_y_and_writes_plus_zero_or_the_bias(dtype, zero, columns):
    """Also where every product is −0."""
    _, before, _, b, scale, h = problem((20, 8, 40, 3, 12), dtype, dtype)
    drop, _ = mask_of(5, *before.shape, P)
    bits = lambda t: t.contiguous().view(torch.int16)  # noqa: E731
    bias, scale = before[0].clone(), torch.full_like(scale, zero)
    bias[::4] = before[::3] = -0.0
    nothing = torch.zeros_like(bias).expand_as(before)
    for head, w in ((h, b), (h.abs(), b.abs()), (h.abs(), -b.abs())):
        for dropped in ({}, drop):
            tile = KernelConfig(64, 32, 4, 2, columns=columns)
            run = lambda y, **o: expand(y, head, w, scale, ALPHA, **dropped, **o, config=tile)  # noqa: B023, E731
            y = before.clone()
            run(y)
            assert torch.equal(bits(y), bits(before))
            run(y, accumulate=False)
            assert torch.equal(bits(y), bits(nothing))
            run(y, accumulate=False, bias=bias)
            assert torch.equal(bits(y), bits(bias.expand_as(y)))


@pytest.mark.parametrize(
    ("shape", "p"), [((37, 83, 45, 3, 12), 0.0), ((3, 48, 1, 2, 4), P), ((70, 40, 48, 5, 32), P)], ids=str
)
def test_writing_instead_of_adding(shape, p):
    """Whatever the strides of y, h, w and scale, NaN in y is neither read nor kept, and nothing beside y is written."""
    _, dy, _, b, scale, h = problem(shape, torch.float32, torch.float32)
    N, (drop, keep) = dy.shape[1], mask_of(23, *dy.shape, p)
    scalar = scale[:, :1].expand_as(scale)
    heads = torch.cat([h, h], 1)[:, h.shape[1] :]
    for head, w, s in ((h, b, scale), (heads, b.contiguous(), scale.T.contiguous().T), (h, b, scalar)):
        wide = torch.full((dy.shape[0], N + 40), math.nan, device=DEVICE)
        y, added = wide[:, 20 : 20 + N], torch.zeros_like(dy)
        expand(y, head, w, s, ALPHA, **drop, accumulate=False)
        within(y, lambda *t: expanded(0.0, *t), head, w, ALPHA * s.double(), keep, dtype=torch.float32)
        assert wide[:, :20].isnan().all()
        assert wide[:, 20 + N :].isnan().all()
        expand(added, head, w, s, ALPHA, **drop)
        assert torch.equal(y, added)


@pytest.mark.parametrize(("n", "r", "accumulate"), [(3, 12, True), (1, 300, False), (5, 1, True)])
def test_a_kept_weight_and_one_in_slices_agree(n, r, accumulate):
    _, y, _, b, scale, h = problem((40, 8, 45, n, r), torch.float32, torch.float32)
    drop, _ = mask_of(3, *y.shape, P)
    results = []
    for columns, programs in ((512, 1), (512, 100), (16, 1), (16, 100)):
        out, tile = y.clone(), KernelConfig(32, 32, 4, 2, columns=columns, programs=programs)
        expand(out, h, b, scale, ALPHA, **drop, accumulate=accumulate, config=tile)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[2], results[3])
    torch.testing.assert_close(results[0], results[2])
