"""Many steps, many draws of dropout, large addresses, and non-finite values. ``make soak`` takes more."""

import gc
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from device import DEVICE
from soak import amount
from torch import nn
from torch.utils.checkpoint import checkpoint

from multilora_fast import FusedMultiLoRALinear, dropout_mask, multilora_add, multilora_linear
from multilora_fast.kernels.configs import KernelConfig, device_of, pick
from multilora_fast.kernels.dropout import draw, drop_threshold
from multilora_fast.kernels.dropout import dropout_mask as kernel_mask
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.reduce import reduce
from multilora_fast.kernels.shrink import shrink
from multilora_fast.testing import random_case, reference_op, run

BACKENDS = ["torch", "triton"]
MIB = 2**20

# Steps


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_leave_nothing_behind(backend, device):
    steps = amount(400 if backend == "torch" else 8, 2000)
    layers = nn.ModuleList(FusedMultiLoRALinear(nn.Linear(16, 16), r=2, lora_num=2, lora_dropout=0.1) for _ in range(2))
    layers.to(device)
    for layer in layers:
        layer.backend = backend
    optimizer = torch.optim.AdamW(layers.parameters())
    x = torch.randn(6, 16, device=device)

    def step(i: int) -> None:
        y = layers[0](x)
        y = checkpoint(layers[1], y, use_reentrant=False) if i % 2 else layers[1](y)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    warm = steps // 4
    for i in range(warm):
        step(i)
    tensors, bytes_before = live_tensors(), resident()
    for i in range(warm, steps):
        step(i)
    grown = resident() - bytes_before
    print(f"{backend}: {steps} steps, {live_tensors() - tensors} more live tensors, {grown / MIB:+.1f} MiB resident")
    assert live_tensors() == tensors
    assert grown < 8 * MIB


# Dropout

ELEMENTS = amount(2 * 10**7, 2 * 10**8)


def philox_mask(seed: int, first: int, M: int, K: int, p: float) -> torch.Tensor:
    """Rows first to first + M of the kernels' mask of K columns: Philox 4x32-7 (Salmon et al., 2011) in numpy."""
    groups, low = math.ceil(K / 8), np.uint64(2**32 - 1)
    counter = np.uint64(first * groups) + np.arange(M * groups, dtype=np.uint64)
    c = [counter & low, counter >> np.uint64(32), *(np.zeros_like(counter) for _ in range(2))]
    key = [seed & (2**32 - 1), seed >> 32 & (2**32 - 1)]
    for _ in range(7):
        first_product, second_product = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            second_product >> np.uint64(32) ^ c[1] ^ np.uint64(key[0]), second_product & low,
            first_product >> np.uint64(32) ^ c[3] ^ np.uint64(key[1]), first_product & low,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & (2**32 - 1), (key[1] + 0xBB67AE85) & (2**32 - 1)]
    words = np.stack(c, 1).astype("<u4").view("<u2").reshape(M, groups * 8)[:, :K]
    return torch.from_numpy(words >= drop_threshold(p))


@pytest.mark.parametrize("shape", [(33, 37), (5, 200), (70, 64)])
@pytest.mark.parametrize("seed", [0, 12345, -(2**62) + 1])
def test_the_kernels_mask_is_numpys(seed, shape):
    mask = kernel_mask(torch.tensor([seed], device=DEVICE), *shape, 0.3).cpu()
    assert torch.equal(mask, philox_mask(seed, 0, *shape, 0.3))


def philox_chunks(seed: int, M: int, K: int, p: float) -> torch.Tensor:
    rows = range(0, M, 500)
    return torch.cat([philox_mask(seed, first, min(500, M - first), K, p) for first in rows])


MASKS = {"torch": dropout_mask, "triton": philox_chunks}  # the interpreter would take hours


def sigmas(counts: torch.Tensor, chances: torch.Tensor) -> float:
    """χ² of counts in cells of known chance, in standard deviations (Wilson and Hilferty, 1931). Cells that expect less
    than 10 are merged."""
    expected = chances * counts.sum()
    rare = expected < 10
    counts, expected = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (counts.double(), expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    k = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    return ((chi_square / k) ** (1 / 3) - 1 + 2 / (9 * k)) / math.sqrt(2 / (9 * k))


def joint(*masks: torch.Tensor) -> torch.Tensor:
    """The count of each combination of the masks' values."""
    number = sum(mask.to(torch.uint8) << i for i, mask in enumerate(masks))
    return torch.bincount(number.flatten(), minlength=2 ** len(masks))


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_of_dropout_come_at_their_rate_and_know_nothing_of_each_other(backend, p):
    M = K = math.isqrt(ELEMENTS) // 8 * 8
    mask, other = (MASKS[backend](seed, M, K, p) for seed in (1, 2))
    q = 1 - drop_threshold(p) / 65536

    def chances(n: int) -> torch.Tensor:
        ones = torch.tensor([number.bit_count() for number in range(2**n)])
        return q**ones * (1 - q) ** (n - ones).double()

    groups = mask.view(-1, 8)
    columns = mask.sum(0).double()
    found = {
        "rate": sigmas(joint(mask), chances(1)),
        "eight neighbours": sigmas(joint(*groups.unbind(1)), chances(8)),
        "next column": sigmas(joint(mask[:, 1:], mask[:, :-1]), chances(2)),
        "a draw later": sigmas(joint(groups[1:], groups[:-1]), chances(2)),
        "next rows": sigmas(joint(mask[2:], mask[1:-1], mask[:-2]), chances(3)),
        "next seed": sigmas(joint(mask, other), chances(2)),
        "columns": ((columns - M * q).square().sum() / (M * q * (1 - q)) - K).item() / math.sqrt(2 * K),
    }
    shown = ", ".join(f"{name} {value:+.1f}" for name, value in found.items())
    print(f"{backend}, p = {p}, {mask.numel():,} draws, standard deviations of chi-square: {shown}")
    assert max(map(abs, found.values())) < 5


# Addresses


@pytest.fixture
def last_program(monkeypatch):
    """The interpreter runs only the last program of each launch, at its own place in the grid."""
    if DEVICE != "cpu":
        pytest.skip("for the interpreter")
    from triton.runtime import interpreter

    builder, real = interpreter.interpreter_builder, []
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    class Last(interpreter.GridExecutor):
        def __init__(self, fn, arg_names, grid, *rest, **options):
            real[:] = (*grid, 1, 1)[:3]
            super().__init__(fn, arg_names, (1, 1, 1), *rest, **options)

    monkeypatch.setattr(interpreter, "GridExecutor", Last)
    monkeypatch.setattr(builder, "set_grid_dim", lambda *_: set_dim(*real))
    monkeypatch.setattr(builder, "set_grid_idx", lambda *_: set_idx(*(size - 1 for size in real)))


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (ours.double() - wanted).norm() <= 2e-3 * wanted.norm()
    assert wanted.norm() > 0


FAR = 2**25 + 40  # rows of 64 columns: more than 2³¹ elements, of which only the pages at the end ever exist


@pytest.mark.usefixtures("last_program")
def test_rows_beyond_two_to_the_31_elements():
    before = resident()
    K, n, r, p, seed = 64, 2, 32, 0.3, 17
    seed_tensor = torch.tensor([seed])
    config = pick("shrink", FAR, n * r, torch.float16, device_of(torch.empty(0))[0])
    first = (FAR - 1) // config.BLOCK_M * config.BLOCK_M
    a = torch.randn(n, r, K, dtype=torch.float16)
    A = a.flatten(0, 1).double()
    keep = philox_mask(seed, first, FAR - first, K, p).double() / (1 - drop_threshold(p) / 65536)

    x = torch.empty(FAR, K, dtype=torch.float16)
    near = x[first:].normal_().double()
    drop = {"bits": draw(seed_tensor, FAR, K, p), "p": p}
    H = shrink(x, a, **drop)
    assert min(x.numel(), H.numel()) > 2**31
    close(H[first:], (near * keep) @ A.T)
    expand(x, H, a, **drop, config=KernelConfig(64, K, 4, 2, programs=FAR))  # the last program has whole rows
    close(x[first:], near + keep * (H[first:].double() @ A))
    mask = kernel_mask(seed_tensor, FAR, K, p)
    last = (FAR - 1) // 32 * 32
    assert torch.equal(mask[last:], philox_mask(seed, last, FAR - last, K, p))
    assert resident() - before < 1000 * MIB


@pytest.mark.usefixtures("last_program")
def test_sums_of_more_than_two_to_the_31_elements():
    before = resident()
    M, D, n, r = 3, 2**26 + 40, 2, 16
    h = torch.randn(M, n * r, dtype=torch.float16)
    z = torch.empty(M, D, dtype=torch.float16)
    first = (D - 1) // 32 * 32  # of finish_kernel's last program, which is within reduce_kernel's
    z[:, first - 128 :].normal_()
    da = reduce(h, z, n, torch.float16)
    assert da.numel() > 2**31
    close(da[1, :, first:], h[:, r:].double().T @ z[:, first:].double())
    assert resident() - before < 1000 * MIB


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_a_gpu():
    M, K, last = 2**21 + 40, 1024, 100
    x = torch.zeros(M, K, dtype=torch.bfloat16, device="cuda")
    case = random_case((last, K), 64, 3, 8, dtype=torch.bfloat16, device="cuda")
    x[-last:] = case.x
    leaves = {name: p.requires_grad_() for name, p in case.parameters.items()}
    op = partial(multilora_linear, dropout_p=0.25, seed=3)
    y = op(x.requires_grad_(), **leaves)
    y[-last:].backward(case.dy)
    mask = dropout_mask(torch.tensor([3], device="cuda"), M, K, 0.25)[-last:]
    case.scaling_factor, case.factor = 1.0, mask.double() / 0.75
    wanted = run(reference_op(case), case.map(torch.Tensor.double))
    for name, ours in {"out": y[-last:], "x": x.grad[-last:], **{k: v.grad for k, v in leaves.items()}}.items():
        assert (ours.double() - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


# Values that are not finite


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spreads_as_in_the_reference(value, backend, device):
    case = random_case((4, 5, 24), 16, 3, 4, device=device)
    case.x[1, 2, 3] = value
    ours = run(partial(multilora_linear, scaling_factor=case.scaling_factor, backend=backend), case)
    wanted = run(reference_op(case), case)
    for name, theirs in wanted.items():
        assert torch.equal(ours[name].isnan(), theirs.isnan()), name
        assert torch.equal(ours[name].isinf(), theirs.isinf()), name
    assert not wanted["out"].isfinite().all()
    assert wanted["x"].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_behind_dropout(value, kept, backend, device):
    """Kept, it spreads as in the reference. Dropped, the kernels skip it, and torch matmuls and the reference multiply
    it by 0."""
    case = random_case((6, 8), 5, 2, 3, device=device)
    seed = torch.tensor([4], device=device)
    mask = dropout_mask(seed, 6, 8, 0.5, backend=backend)
    token, k = (mask == kept).nonzero()[0].tolist()
    case.x[token, k] = value
    branches = [case.parameters[name] for name in ("lora_A", "lora_B", "lora_scaling")]
    options = {"dropout_p": 0.5, "seed": seed, "backend": backend}
    y = multilora_add(torch.zeros(6, 5, device=device), case.x, *branches, **options)
    spread = (~y.isfinite()).any(1).nonzero().flatten().tolist()
    assert spread == ([token] if kept or backend == "torch" else [])
