"""Every kernel against the same formula in float64, in the interpreter where there is no GPU, by the 2× rule.

Outputs are allocated full of NaN, so that an element a kernel does not write fails.
"""

import pytest
import torch
from device import DEVICE
from formulas import (
    ALPHA,
    P,
    expanded,
    mask_of,
    outputs_of_nan,
    problem,
    reduced,
    reduced_scaled,
    seed_of,
    shrunk,
    within,
)

from multilora_fast.kernels.configs import KernelConfig
from multilora_fast.kernels.dropout import draw, dropout_mask
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.pack import Packing, pack
from multilora_fast.kernels.reduce import reduce, reduce_all, reduce_scaled
from multilora_fast.kernels.shrink import shrink

DTYPES = [torch.float32, torch.float16]
if DEVICE == "cpu":
    DTYPES.append(torch.float64)
# M, K, N, n, r
SHAPES = [
    (1, 8, 8, 1, 1), (3, 65, 33, 2, 4), (37, 83, 45, 3, 12), (70, 72, 40, 5, 32),
    (130, 40, 72, 1, 32), (66, 24, 150, 5, 1), (2, 300, 140, 3, 32), (9, 33, 17, 2, 150),
]  # fmt: skip


@pytest.fixture(autouse=True)
def nan_outputs(monkeypatch):
    outputs_of_nan(monkeypatch)


@pytest.mark.parametrize(("M", "K"), [(3, 300), (70, 300), (1030, 20)])
def test_shrink_into_columns_of_a_wider_tensor(M, K):
    """D split over programs, and not."""
    x, _, a, *_ = problem((M, K, 8, 2, 5), torch.float32, torch.float32)
    wide = torch.full((M, 25), torch.nan, device=DEVICE)
    wanted = shrink(x, a)
    assert shrink(x, a, out=wide[:, 7:17]).data_ptr() == wide[:, 7:].data_ptr()
    assert torch.equal(wide[:, 7:17], wanted)
    assert wide[:, :7].isnan().all()
    assert wide[:, 17:].isnan().all()
    with pytest.raises(ValueError, match="out has shape"):
        shrink(x, a, out=wide)


@pytest.mark.parametrize(("min_steps", "scaled"), [(None, True), (None, False), (1, True)])
def test_what_shrink_packs_beside_is_what_pack_gives(min_steps, scaled):
    """Where D is split, pack has a launch of its own."""
    x, _, a, b, scale, _ = problem((37, 100, 200, 3, 12), torch.float32, torch.float32)
    config, scale = KernelConfig(32, 32, 4, 2, min_steps), scale if scaled else None
    out = torch.full((200, 36), torch.nan, device=DEVICE).t()
    packing = Packing(b, scale, ALPHA, out)
    assert torch.equal(shrink(x, a, packing=packing, config=config), shrink(x, a, config=config))
    assert torch.equal(out, pack(b, torch.float32, scale, ALPHA))
    packed = ALPHA * (b.double() if scale is None else scale[:, None].double() * b.double())
    torch.testing.assert_close(out, packed.reshape(36, 200).float())


def check_all_uses(shape, dtype, params, p, scalar=False, config=None):
    x, dy, a, b, scale, h = problem(shape, dtype, params, scalar)
    n = a.shape[0]
    drop, keep = mask_of(-(2**62) + 12345, *x.shape, p)
    ones = torch.ones(n, x.shape[1], device=DEVICE)
    scaled = (ALPHA * scale.double()).to(torch.float64)
    on = torch.ones((), device=DEVICE)

    within(shrink(x, a, **drop, config=config), shrunk, x, a, ones, keep, dtype=dtype)
    within(shrink(dy, b, scale, ALPHA, config=config), shrunk, dy, b, scaled, on, dtype=dtype)
    y = dy.clone()
    expand(y, h, b, scale, ALPHA, config=config)
    within(y, expanded, dy, h, b, scaled, on, dtype=dtype)
    expand(y, h, b, scale, ALPHA, accumulate=False, config=config)
    within(y, lambda *t: expanded(0.0, *t), h, b, scaled, on, dtype=dtype)
    bias = dy[:1].sum(0).to(params)
    expand(y, h, b, scale, ALPHA, accumulate=False, bias=bias, config=config)
    within(y, expanded, bias.to(dtype), h, b, scaled, on, dtype=dtype)
    dx = x.clone()
    expand(dx, h, a, **drop, config=config)
    within(dx, expanded, x, h, a, ones, keep, dtype=dtype)
    expand(dx, h, a, **drop, accumulate=False, config=config)
    within(dx, lambda *t: expanded(0.0, *t), h, a, ones, keep, dtype=dtype)
    each = *reduce_scaled(h, dy, b, scale, ALPHA, config=config), reduce(h, x, n, params, **drop, config=config)
    for db, ds, da in (each, reduce_all(h, dy, b, scale, ALPHA, h, x, params, **drop, config=config)):
        within(db, lambda *t: reduced_scaled(*t)[0], h, dy, b, scaled, dtype=dtype)
        within(ds, lambda *t: reduced_scaled(*t)[1], h, dy, b, scaled, dtype=dtype)
        within(da, lambda h, x, keep: reduced(h, x, keep, n), h, x, keep, dtype=dtype)
    assert (da.dtype, db.dtype) == (params, params)
    assert db.is_contiguous()
    assert ds.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("at", "k"), [(at, k) for at in range(len(SHAPES)) for k in range(len(DTYPES)) if (at + k) % 2]
)
def test_every_use_agrees_with_the_formula(at, k):
    check_all_uses(SHAPES[at], DTYPES[k], DTYPES[k], P if at % 3 else 0.0, scalar=at % 4 < 2)


@pytest.mark.parametrize(("n", "r"), [(2, 12), (5, 4), (5, 32), (1, 300)])
def test_ranks(n, r):
    check_all_uses((18, 40, 24, n, r), torch.float32, torch.float32, P)


LONG_RANKS = [(3, 96, torch.float32, 256), (3, 96, torch.float16, 512)]
LONG_RANKS += [(4, 128, torch.float16, 256), (4, 130, torch.float32, 512)]


@pytest.mark.parametrize(("n", "r", "dtype", "columns"), LONG_RANKS)
def test_ranks_of_several_layers_summed_in_parts(n, r, dtype, columns, monkeypatch):
    for module in ("shrink", "reduce"):
        monkeypatch.setattr(f"multilora_fast.kernels.{module}.device_of", lambda x: ("interpreter", 132))
    tile = KernelConfig(32, 32, 8, 1, min_steps=1, pack=True, columns=columns)
    check_all_uses((33, 40, 20, n, r), dtype, dtype, P, config=tile)


def test_float32_parameters_with_float16_tokens():
    check_all_uses((37, 83, 45, 3, 12), torch.float16, torch.float32, P)


@pytest.mark.parametrize("shape", [(0, 16, 16, 2, 4), (5, 0, 16, 2, 4), (5, 16, 0, 2, 4)], ids=str)
def test_empty_axes(shape):
    check_all_uses(shape, torch.float32, torch.float32, P)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 4096, 3, 32), (777, 1024, 2048, 5, 32), (999, 4096, 1376, 5, 12)], ids=str)
def test_every_use_on_the_gpu(shape, dtype):
    check_all_uses(shape, dtype, dtype, P)
    check_all_uses(shape, dtype, torch.float32, P)


def test_bfloat16_in_the_interpreter_is_close():
    if DEVICE != "cpu":
        pytest.skip("the interpreter multiplies bfloat16 in float32")
    x, dy, a, b, scale, h = problem((37, 83, 45, 3, 12), torch.bfloat16, torch.bfloat16)
    y = dy.clone()
    expand(y, h, b, scale, ALPHA)
    truth = expanded(dy.double(), h.double(), b.double(), ALPHA * scale.double(), 1.0)
    assert (y.double() - truth).norm() < 0.01 * truth.norm()
    truth = shrunk(x.double(), a.double(), torch.ones(3, 83).double(), 1.0)
    assert (shrink(x, a).double() - truth).norm() < 0.01 * truth.norm()


def test_same_inputs_give_the_same_bits():
    x, dy, a, b, scale, h = problem((5, 300, 40, 2, 32), torch.float32, torch.float32)
    drop, _ = mask_of(7, *x.shape, P)

    def outputs():
        y, dx = dy.clone(), x.clone()
        expand(y, h, b, scale, ALPHA)
        expand(dx, h, a, **drop)
        return [
            shrink(x, a, **drop), shrink(dy, b, scale, ALPHA), y, dx,
            reduce(h, x, 2, x.dtype, **drop), *reduce_scaled(h, dy, b, scale, ALPHA),
        ]  # fmt: skip

    assert all(torch.equal(first, second) for first, second in zip(outputs(), outputs(), strict=True))


def test_strided_inputs_and_outputs():
    x, dy, a, b, scale, h = problem((37, 48, 45, 3, 12), torch.float32, torch.float32)
    wide = torch.cat([dy, dy], 1)
    y = wide[:, 20:65]
    want = expanded(y.double(), h.double(), b.double(), ALPHA * scale.double(), 1.0)
    outside = wide[:, :20].clone(), wide[:, 65:].clone()
    expand(y, torch.cat([h, h], 1)[:, 36:], b.contiguous(), scale.T.contiguous().T, ALPHA)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, :20], outside[0])
    assert torch.equal(wide[:, 65:], outside[1])
    for odd in (x[::2], x.T.contiguous().T, torch.cat([x, x], 1)[:, 16:64], x[:1].expand(9, 48)):
        torch.testing.assert_close(shrink(odd, a), shrink(odd.contiguous(), a))
        heads = h[: odd.shape[0]]
        torch.testing.assert_close(reduce(heads, odd, 3, x.dtype), reduce(heads, odd.contiguous(), 3, x.dtype))


def test_addresses_beyond_two_to_the_31_elements():
    """Rows whose stride fits 32 bits and whose offset does not; only the pages they touch ever exist."""
    stride = 2**30 + 64
    storage = torch.zeros(0, dtype=torch.float16, device=DEVICE).resize_(2 * stride + 40)
    far = storage.as_strided((3, 40), (stride, 1))
    near = torch.randn(3, 40, device=DEVICE).half()
    far.copy_(near)
    _, _, a, _, _, h = problem((3, 40, 8, 2, 4), torch.float16, torch.float16)
    assert torch.equal(shrink(far, a), shrink(near, a))
    assert torch.equal(reduce(h, far, 2, torch.float32), reduce(h, near, 2, torch.float32))
    expand(far, h, a)
    expand(near, h, a)
    assert torch.equal(far, near)


def test_meta_tensors_get_shapes_without_a_launch():
    x, dy, h = (torch.empty(7, d, device="meta") for d in (20, 30, 6))
    a, b, scale = (torch.empty(2, *size, device="meta") for size in ((3, 20), (30, 3), (30,)))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    bits = draw(seed, 7, 20, P)
    assert (bits.shape, bits.dtype) == ((7, 1), torch.int32)
    assert shrink(x, a, bits=bits, p=P).shape == (7, 6)
    assert expand(dy, h, b.transpose(1, 2), scale) is None
    assert reduce(h, x, 2, torch.float16, bits, P).shape == (2, 3, 20)
    db, ds = reduce_scaled(h, dy, b.transpose(1, 2), scale)
    assert (db.shape, ds.shape) == ((2, 30, 3), (2, 30))
    assert dropout_mask(seed, 4, 5, P).shape == (4, 5)


def test_mistakes_are_named():
    x, dy, a, b, scale, h = problem((4, 16, 24, 2, 3), torch.float32, torch.float32)
    bits = draw(seed_of(0), 4, 16, P)
    mistakes = [
        ("w has shape", shrink, (x, b)),
        ("scale has shape", shrink, (dy, b, scale[:, :5])),
        ("p is 1", draw, (seed_of(0), 4, 16, 1.0)),
        ("seed has dtype", draw, (torch.zeros(2, device=DEVICE), 4, 16, P)),
        ("p is 1", shrink, (x, a, None, 1.0, bits, 1.0)),
        ("bias has shape", expand, (dy, h, b, None, 1.0, None, 0.0, True, dy[0])),
        ("bias has shape", expand, (dy, h, b, None, 1.0, None, 0.0, False, x[0])),
        ("x has shape", shrink, (x.long(), a)),
        ("y has shape", expand, (torch.empty(24, 4, device=DEVICE).T, h, b)),
        ("h has shape", expand, (dy, h[:, :5], b)),
        ("h has shape", reduce, (h[:2], x, 2, x.dtype)),
        ("n is 4", reduce, (h, x, 4, x.dtype)),
        ("h has 5 columns", reduce_scaled, (h[:, :5], dy, b, scale)),
        ("h has 4 columns", reduce_all, (h, dy, b, scale, 1.0, h[:, :4], x, x.dtype)),
        ("x has 2 rows", reduce_all, (h, dy, b, scale, 1.0, h[:2], x[:2], x.dtype)),
    ]
    for bits in (draw(seed_of(0), 4, 40, P), draw(seed_of(0), 3, 16, P), torch.zeros(4, 1, device=DEVICE)):
        mistakes += [("bits has shape", shrink, (x, a, None, 1.0, bits, P))]
        mistakes += [("bits has shape", expand, (x, h, a, None, 1.0, bits, P))]
        mistakes += [("bits has shape", reduce, (h, x, 2, x.dtype, bits, P))]
    for match, launcher, arguments in mistakes:
        with pytest.raises(ValueError, match=match):
            launcher(*arguments)
