"""The kernels of experts against a loop over rows: how rows are spread over experts, gathered and dropped.

Outputs are allocated full of NaN, so that an element a kernel does not write fails.
"""

import pytest
import torch
from device import DEVICE
from formulas import ALPHA, P, make, mask_of, outputs_of_nan, within

from multilora_fast.kernels.grouped_expand import grouped_expand
from multilora_fast.kernels.grouped_reduce import grouped_reduce, grouped_reduce_scaled
from multilora_fast.kernels.grouped_shrink import grouped_shrink

# Rows of each expert, and rows of none.
CASES = {
    "even": ([8, 8, 8, 8, 8], 0),
    "many tiny": ([2, 0, 1, 1, 0, 3, 1, 0, 0, 2] * 2 + [0, 1, 0], 0),
    "one expert": ([0, 0, 37, 0], 0),
    "one of one": ([21], 0),
    "one token": ([0, 1, 0, 1], 0),
    "skewed": ([50, 0, 2, 1], 0),
    "sentinels": ([5, 0, 19, 4], 13),
    "nothing but sentinels": ([0, 0, 0], 5),
    "nothing": ([0, 0, 0], 0),
}
DTYPES = [torch.float32, torch.float16] + [torch.float64] * (DEVICE == "cpu")
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
        self.expert = [e for e, count in enumerate(counts) for _ in range(count)]
        self.offs = torch.tensor(counts, device=DEVICE).cumsum(0).int()
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

    # The formulas, a row at a time; what an expert gets of its rows is added in their order.

    def shrunk(self, x, w, scale, keep):
        out = x.new_zeros(len(x), w.shape[1] * w.shape[2])
        for s, e in enumerate(self.expert):
            out[s] = torch.einsum("d,nrd,nd->nr", x[s] * keep[s], w[e], scale[e]).flatten()
        return out

    def expanded(self, y, h, w, scale, keep):
        out = y.clone()
        for s, e in enumerate(self.expert):
            out[s] += keep[s] * torch.einsum("nr,nrd,nd->d", h[s].view(w.shape[1:3]), w[e], scale[e])
        return out

    def reduced(self, h, x, keep):
        out = x.new_zeros(len(self.offs), h.shape[1], x.shape[1])
        for s, e in enumerate(self.expert):
            out[e] += torch.outer(h[s], x[s] * keep[s])
        return out.view(len(self.offs), self.n, -1, x.shape[1])

    def reduced_scaled(self, h, dy, w, scale):
        products = self.reduced(h, dy, torch.ones_like(dy)).transpose(2, 3)
        return scale[..., None] * products, ALPHA * (w.transpose(2, 3) * products).sum(-1)

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
        for e in set(range(len(self.offs))) - set(self.expert):
            assert not any(t[e].count_nonzero() for t in (da, db, ds))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_use_agrees_with_a_loop_over_rows(case, dtype):
    position = list(CASES).index(case)
    Problem(case, (83, 45, 3, 4), dtype, ("vector", "scalar", None)[position % 3], P if position % 2 else 0.0).check()


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("scale", ["vector", "scalar", None])
def test_scales_and_dropout(scale, p):
    Problem("sentinels", (70, 33, 2, 3), torch.float64, scale, p).check()
