"""The kernels of experts against a loop over experts: how rows are spread over experts, gathered and dropped.

Outputs are allocated full of NaN, so that an element a kernel does not write fails.
"""

import pytest
import torch
from device import DEVICE
from formulas import ALPHA, P, expanded, make, mask_of, outputs_of_nan, reduced, reduced_scaled, shrunk, within

from multilora_fast.kernels.configs import KernelConfig
from multilora_fast.kernels.grouped_expand import grouped_expand
from multilora_fast.kernels.grouped_reduce import grouped_reduce, grouped_reduce_scaled
from multilora_fast.kernels.grouped_shrink import grouped_shrink

# Rows of each expert, and rows of none.
CASES = {
    "even": ([4, 4, 4], 0),
    "many tiny": ([2, 0, 1, 1, 0, 3, 1, 0, 0, 2, 0], 0),
    "one expert": ([0, 0, 33, 0], 0),
    "one of one": ([5], 0),
    "one token": ([0, 1, 0, 1], 0),
    "skewed": ([35, 0, 2, 1], 0),
    "sentinels": ([5, 0, 9], 9),
    "nothing but sentinels": ([0, 0], 5),
    "nothing": ([0, 0], 0),
}
EXACT = torch.float64 if DEVICE == "cpu" else torch.float32
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def nan_outputs(monkeypatch):
    outputs_of_nan(monkeypatch)


class Problem:
    """S sorted rows: row s is row index[s] of x and row ids[s] of the mask, whose rows are in another order."""

    def __init__(self, case, sizes, dtype, scale="vector", p=P, params=None):
        (counts, sentinels), (K, N, n, r) = CASES[case], sizes
        E, S, params = len(counts), sum(counts) + sentinels, params or dtype
        T = S // 2 + 1
        self.n, self.live, self.dtype = n, sum(counts), dtype
        ends = torch.tensor(counts).cumsum(0)
        self.rows_of = [slice(end - count, end) for end, count in zip(ends.tolist(), counts, strict=True)]
        self.offs = ends.int().to(DEVICE)
        self.ids = torch.randperm(2 * T, device=DEVICE)[:S]
        self.index = self.ids // 2
        self.x, self.dy, self.h = make(T, K, dtype=dtype), make(S, N, dtype=dtype), make(S, n * r, dtype=dtype)
        self.a, b = make(E, n, r, K, dtype=params), make(E, n, N, r, dtype=params)
        self.b = b.transpose(2, 3)
        vector, scalar = make(E, n, N, dtype=params), make(E, n, 1, dtype=params).expand(E, n, N)
        self.scale = {"vector": vector, "scalar": scalar, None: None}[scale]
        self.scaled = ALPHA * (torch.ones_like(vector) if scale is None else self.scale).double()
        drop, keep = mask_of(5, 2 * T, K, p)
        self.drop, self.keep = {**drop, "ids": self.ids}, keep[self.ids]
        self.rows = self.x[self.index]

    # The formulas, an expert at a time.

    def shrunk(self, x, w, scale, keep):
        each = [shrunk(x[at], w[e], scale[e], keep[at]) for e, at in enumerate(self.rows_of)]
        return torch.cat([*each, x.new_zeros(len(x) - self.live, self.h.shape[1])])

    def expanded(self, y, h, w, scale, keep):
        each = [expanded(y[at], h[at], w[e], scale[e], keep[at]) for e, at in enumerate(self.rows_of)]
        return torch.cat([*each, y[self.live :]])

    def reduced(self, h, x, keep):
        return torch.stack([reduced(h[at], x[at], keep[at], self.n) for at in self.rows_of])

    def reduced_scaled(self, h, dy, w, scale):
        each = [reduced_scaled(h[at], dy[at], w[e], scale[e]) for e, at in enumerate(self.rows_of)]
        return [torch.stack(gradients) for gradients in zip(*each, strict=True)]

    def agree(self, got, formula, *inputs):
        within(got, formula, *inputs, dtype=self.dtype)
        truth = formula(*(t.double() for t in inputs))
        if self.dtype in BOUNDS and truth.numel():
            assert (got - truth).abs().max() <= BOUNDS[self.dtype] * truth.abs().max()

    def check(self, config=None):
        ones, on = torch.ones_like(self.a[:, :, 0]), torch.ones_like(self.dy)
        x = {"index": self.index, **self.drop, "config": config}
        self.agree(grouped_shrink(self.x, self.a, self.offs, **x), self.shrunk, self.rows, self.a, ones, self.keep)
        dh = grouped_shrink(self.dy, self.b, self.offs, self.scale, ALPHA, config=config)
        self.agree(dh, self.shrunk, self.dy, self.b, self.scaled, on)
        y, dx = self.dy.clone(), self.rows.clone()
        grouped_expand(y, self.h, self.b, self.offs, self.scale, ALPHA, config=config)
        self.agree(y, self.expanded, self.dy, self.h, self.b, self.scaled, on)
        grouped_expand(dx, self.h, self.a, self.offs, **self.drop, config=config)
        self.agree(dx, self.expanded, self.rows, self.h, self.a, ones, self.keep)
        assert torch.equal(y[self.live :], self.dy[self.live :])
        assert torch.equal(dx[self.live :], self.rows[self.live :])
        da = grouped_reduce(self.h, self.x, self.offs, self.n, self.a.dtype, **x)
        self.agree(da, self.reduced, self.h, self.rows, self.keep)
        db, ds = grouped_reduce_scaled(self.h, self.dy, self.b, self.offs, self.scale, ALPHA, config=config)
        inputs = self.h, self.dy, self.b, self.scaled
        self.agree(db, lambda *t: self.reduced_scaled(*t)[0], *inputs)
        self.agree(ds, lambda *t: self.reduced_scaled(*t)[1], *inputs)
        assert (da.dtype, db.dtype) == (self.a.dtype, self.b.dtype)
        assert ds.dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
        empty = [e for e, at in enumerate(self.rows_of) if at.start == at.stop]
        assert all(t[empty].count_nonzero() == 0 for t in (da, db, ds))


@pytest.mark.parametrize("case", CASES)
def test_every_use_agrees_with_a_loop_over_experts(case):
    at = list(CASES).index(case)
    Problem(case, (70, 33, 2, 3), EXACT, ("vector", None, "scalar")[at % 3], P if at % 2 else 0.0).check()


@pytest.mark.parametrize(("case", "dtype"), [("many tiny", torch.float32), ("sentinels", torch.float16)], ids=str)
def test_lower_precision_by_the_2x_rule(case, dtype):
    Problem(case, (70, 33, 3, 4), dtype).check()


def test_float32_parameters_with_float16_rows():
    Problem("one token", (40, 33, 3, 4), torch.float16, params=torch.float32).check()


@pytest.mark.parametrize(("n", "r"), [(1, 1), (1, 3), (3, 32), (5, 32)])
def test_ranks(n, r):
    Problem("one of one", (40, 33, n, r), torch.float32).check()


@pytest.mark.parametrize(("n", "r", "columns", "two_tiles"), [(7, 5, 16, True), (1, 96, 64, False), (3, 60, 128, True)])
def test_a_rank_in_chunks_and_slices(n, r, columns, two_tiles):
    """Branches that begin in one tile and end in another, and one that is wider than a chunk."""
    tile = KernelConfig(32, 32, 4, 1, two_tiles=two_tiles, columns=columns)
    Problem("one token", (40, 33, n, r), EXACT).check(tile)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["skewed", "many tiny", "sentinels"])
def test_every_use_on_the_gpu(case, dtype):
    for n, r in ((2, 3), (3, 8), (3, 32), (15, 32)):
        Problem(case, (512, 384, n, r), dtype).check()
        Problem(case, (512, 384, n, r), dtype, params=torch.float32).check()


def test_same_inputs_give_the_same_bits():
    t = Problem("sentinels", (40, 33, 2, 3), torch.float32)

    def outputs():
        y, dx = t.dy.clone(), t.rows.clone()
        grouped_expand(y, t.h, t.b, t.offs, t.scale, ALPHA)
        grouped_expand(dx, t.h, t.a, t.offs, **t.drop)
        shrunk = grouped_shrink(t.x, t.a, t.offs, index=t.index, **t.drop)
        reduced = grouped_reduce(t.h, t.x, t.offs, t.n, t.a.dtype, t.index, **t.drop)
        return [y, dx, shrunk, reduced, *grouped_reduce_scaled(t.h, t.dy, t.b, t.offs, t.scale, ALPHA)]

    assert all(torch.equal(first, second) for first, second in zip(outputs(), outputs(), strict=True))


@pytest.mark.parametrize("columns", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_zero_scale_leaves_the_bits_of_y(dtype, columns):
    """Also where every product is −0, and y is."""
    t, tile = Problem("one token", (40, 33, 3, 8), dtype), KernelConfig(16, 64, 4, 1, columns=columns)
    bits = torch.randint(-(2**31), 2**31 - 1, (2, 2), dtype=torch.int32, device=DEVICE)
    t.dy[:, ::3] = -0.0
    for zero in (torch.zeros_like(t.scale), -torch.zeros_like(t.scale)):
        for drop in ({}, {"bits": bits, "p": P}):
            y = t.dy.clone()
            grouped_expand(y, t.h.abs(), t.b.abs(), t.offs, zero, ALPHA, **drop, config=tile)
            assert torch.equal(y.view(torch.int16), t.dy.view(torch.int16))


def test_strided_rows_and_an_expert_beyond_two_to_the_31_elements():
    """Strides that fit 32 bits with offsets that do not; only the pages they touch ever exist."""
    t, stride = Problem("even", (40, 33, 2, 3), torch.float16), 2**30 + 64
    far = torch.zeros(0, dtype=torch.float16, device=DEVICE).resize_(2 * stride + 240)
    far = far.as_strided((3, 2, 3, 40), (stride, 120, 40, 1))
    far.copy_(t.a)
    x = torch.cat([t.x, t.x], 1)[:, 40:]
    given = {"index": t.index, **t.drop}
    assert torch.equal(grouped_shrink(x, far, t.offs, **given), grouped_shrink(t.x, t.a, t.offs, **given))
    wide = torch.cat([t.rows, t.rows], 1)
    outside, dx = wide[:, :40].clone(), t.rows.clone()
    grouped_expand(wide[:, 40:], torch.cat([t.h, t.h], 1)[:, 6:], far, t.offs, **t.drop)
    grouped_expand(dx, t.h, t.a, t.offs, **t.drop)
    assert torch.equal(wide[:, 40:], dx)
    assert torch.equal(wide[:, :40], outside)


def test_meta_tensors_get_shapes_without_a_launch():
    x, dy, h = (torch.empty(*size, device="meta") for size in ((4, 20), (7, 30), (7, 6)))
    a, b, scale = (torch.empty(5, 2, *size, device="meta") for size in ((3, 20), (30, 3), (30,)))
    offs = torch.empty(5, dtype=torch.int32, device="meta")
    index, b = torch.empty(7, dtype=torch.int64, device="meta"), b.transpose(2, 3)
    assert grouped_shrink(x, a, offs, index=index).shape == (7, 6)
    assert grouped_expand(dy, h, b, offs, scale) is None
    assert grouped_reduce(h, x, offs, 2, torch.float16, index).shape == (5, 2, 3, 20)
    db, ds = grouped_reduce_scaled(h, dy, b, offs, scale)
    assert (db.shape, ds.shape) == ((5, 2, 30, 3), (5, 2, 30))


def test_mistakes_are_named():
    t = Problem("even", (40, 33, 2, 3), torch.float32)
    x, h, index, offs, bits = t.x, t.h, t.index, t.offs, t.drop["bits"]
    ends, rest = (offs[:2], offs.long(), offs[:, None], offs.repeat(2)[::2]), (None, 1.0)
    mistakes = [
        *(("w has shape", grouped_shrink, (x, w, offs, *rest, index)) for w in (t.b, t.a[0], t.a[:0], t.a[:, :0])),
        *(("offs has shape", grouped_shrink, (x, t.a, wrong, *rest, index)) for wrong in ends),
        *(("offs has shape", grouped_reduce, (h, x, wrong, 2, x.dtype, index)) for wrong in (offs[:0], offs.long())),
        *(("index has shape", grouped_shrink, (x, t.a, offs, *rest, i)) for i in (index.int(), index.repeat(2)[::2])),
        *(("bits has shape", grouped_expand, (t.rows, h, t.a, offs, *rest, None, b, P)) for b in (bits, bits.long())),
        ("scale has shape", grouped_shrink, (t.dy, t.b, offs, t.scale[0])),
        ("ids has shape", grouped_shrink, (x, t.a, offs, None, 1.0, index, t.ids[:3], bits, P)),
        ("bits has shape", grouped_reduce, (h, x, offs, 2, x.dtype, index, t.ids, bits[0], P)),
        ("p is 1", grouped_reduce, (h, x, offs, 2, x.dtype, index, None, None, 1.0)),
        ("h has shape", grouped_expand, (t.dy, h[:5], t.b, offs)),
        ("h has shape", grouped_reduce, (h, x, offs, 2, x.dtype)),
        ("h has shape", grouped_reduce_scaled, (h.half(), t.dy, t.b, offs, t.scale)),
        ("h has 5 columns", grouped_reduce_scaled, (h[:, :5], t.dy, t.b, offs, t.scale)),
        ("n is 4", grouped_reduce, (h, x, offs, 4, x.dtype, index)),
        ("y has shape", grouped_expand, (t.dy[0], h, t.b, offs)),
    ]
    for match, launcher, arguments in mistakes:
        with pytest.raises(ValueError, match=match):
            launcher(*arguments)
