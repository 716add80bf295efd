"""Bytes loaded and stored, counted in the interpreter: each large tensor crosses the memory bus once per kernel."""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
import triton

from multilora_fast.kernels import configs
from multilora_fast.kernels.configs import KernelConfig
from multilora_fast.kernels.dropout import draw
from multilora_fast.kernels.expand import expand
from multilora_fast.kernels.grouped_expand import grouped_expand
from multilora_fast.kernels.grouped_reduce import grouped_reduce, grouped_reduce_scaled
from multilora_fast.kernels.grouped_shrink import grouped_shrink
from multilora_fast.kernels.reduce import reduce, reduce_all, reduce_scaled
from multilora_fast.kernels.shrink import shrink

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="counts what the interpreter loads and stores"
)

M, K, N = 100, 168, 104
RANKS = [(1, 16), (3, 32), (8, 32)]
PAIRS = [(1, 16, 0.1, M), (3, 32, 0.0, M), (5, 32, 0.1, 9), (8, 32, 0.0, 9), (8, 32, 0.1, M)]  # n, r, p, tokens


class Traffic:
    """Unmasked bytes by tensor, and the order it is loaded in; what lies in no tensor (partial sums, packed weights) is
    counted as "other"."""

    def __init__(self, **tensors):
        self.spans = {name: (t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in tensors.items()}
        self.loads, self.stores, self.order = Counter(), Counter(), []

    def count(self, counter, pointers, mask):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = pointers.dtype.element_ty.primitive_bitwidth // 8
        left = addresses.size
        for name, (first, last) in self.spans.items():
            inside = int(np.count_nonzero((addresses >= first) & (addresses < last)))
            counter[name] += inside * size
            if inside and counter is self.loads:
                self.order.append(name)
            left -= inside
        counter["other"] += left * size


@pytest.fixture
def watch(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def start(**tensors) -> Traffic:
        traffic = Traffic(**tensors)

        def counted_load(self, pointers, mask, *rest):
            traffic.count(traffic.loads, pointers, mask)
            return load(self, pointers, mask, *rest)

        def counted_store(self, pointers, value, mask, *rest):
            traffic.count(traffic.stores, pointers, mask)
            return store(self, pointers, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        return traffic

    return start


def drop(p: float, M: int, K: int) -> dict:
    return {"bits": draw(torch.tensor([5]), M, K, p), "p": p}


@pytest.mark.parametrize(("n", "r", "p", "tokens"), PAIRS)
def test_shrink_reads_x_once(watch, n, r, p, tokens):
    x, a = torch.randn(tokens, K), torch.randn(n, r, K)
    mask = drop(p, tokens, K)
    bits = torch.empty(0) if mask["bits"] is None else mask["bits"]
    traffic = watch(x=x, bits=bits)
    h = shrink(x, a, **mask)
    assert traffic.loads["x"] == x.nbytes
    assert traffic.loads["bits"] == bits.nbytes
    assert traffic.stores["x"] == traffic.stores["bits"] == 0
    config = configs.pick("shrink", tokens, n * r, x.dtype, "interpreter")
    tiles = triton.cdiv(tokens, config.BLOCK_M)
    parts, _ = configs.split_k(tiles, triton.cdiv(K, config.BLOCK_D), 4, config.min_steps)
    partial = parts * h.nbytes if parts > 1 else 0
    assert sum(traffic.stores.values()) == partial + h.nbytes
    assert traffic.loads["other"] == tiles * a.nbytes + partial


@pytest.mark.parametrize(("n", "r"), RANKS)
def test_shrink_reads_dy_once_and_b_once_per_call(watch, n, r):
    dy, b, scale = torch.randn(M, N), torch.randn(n, N, r), torch.randn(n, N)
    traffic = watch(dy=dy, b=b)
    shrink(dy, b.transpose(1, 2), scale, 0.5)
    assert traffic.loads["dy"] == dy.nbytes
    assert traffic.loads["b"] == b.nbytes


@pytest.mark.parametrize(("n", "r", "p", "tokens"), PAIRS)
def test_expand_reads_and_writes_y_once(watch, n, r, p, tokens):
    """And the weight and its scale once per program, whatever tokens it walks over."""
    y, h, b, scale = torch.randn(tokens, N), torch.randn(tokens, n * r), torch.randn(n, N, r), torch.randn(n, N)
    mask = drop(p, tokens, N)
    bits = torch.empty(0) if mask["bits"] is None else mask["bits"]
    traffic = watch(y=y, h=h, b=b, scale=scale, bits=bits)
    config = KernelConfig(32, 64, 4, 2, programs=2)
    expand(y, h, b.transpose(1, 2), scale, 0.5, **mask, config=config)
    columns = triton.cdiv(N, config.BLOCK_D)
    sharing = min(triton.cdiv(tokens, config.BLOCK_M), 4 * config.programs // columns)
    assert traffic.loads["y"] == traffic.stores["y"] == y.nbytes
    assert traffic.stores["other"] == 0
    assert traffic.loads["h"] == columns * h.nbytes
    assert traffic.loads["b"] == sharing * b.nbytes
    assert traffic.loads["scale"] == sharing * r * scale.nbytes
    assert traffic.loads["bits"] == bits.nbytes


@pytest.mark.parametrize(("n", "r", "p", "tokens"), PAIRS)
def test_reduce_reads_x_once(watch, n, r, p, tokens):
    x, h, mask = torch.randn(tokens, K), torch.randn(tokens, n * r), drop(p, tokens, K)
    bits = torch.empty(0) if mask["bits"] is None else mask["bits"]
    traffic = watch(x=x, h=h, bits=bits)
    da = reduce(h, x, n, x.dtype, **mask)
    config = configs.pick("reduce", tokens, n * r, x.dtype, "interpreter", dropout=p > 0)
    tiles = triton.cdiv(K, config.BLOCK_D)
    parts, _ = configs.split_k(tiles, triton.cdiv(tokens, config.BLOCK_M), 4, config.min_steps)
    assert traffic.loads["x"] == x.nbytes
    assert traffic.loads["h"] == tiles * h.nbytes
    assert traffic.loads["bits"] == bits.nbytes
    assert traffic.stores["other"] == (parts + 1) * da.nbytes
    assert traffic.stores["x"] == traffic.stores["h"] == 0


@pytest.mark.parametrize(("n", "r", "columns", "reads"), [(3, 96, 512, 1), (3, 160, 512, 1), (3, 96, 256, 2)])
def test_a_rank_beyond_256_reads_its_large_tensor_once_per_chunk(watch, n, r, columns, reads):
    x, a, h = torch.randn(40, K), torch.randn(n, r, K), torch.randn(40, n * r)
    config, mask = KernelConfig(32, 32, 8, 2, columns=columns), drop(0.1, 40, K)
    traffic = watch(x=x)
    shrink(x, a, **mask, config=config)
    assert traffic.loads["x"] == reads * x.nbytes
    traffic = watch(x=x)
    reduce(h, x, n, x.dtype, **mask, config=config)
    assert traffic.loads["x"] == reads * x.nbytes


def test_the_chunks_of_one_tile_run_next_to_each_other(watch):
    config = KernelConfig(32, 32, 4, 2, min_steps=100)
    x, a = torch.randn(64, 40), torch.randn(2, 150, 40)
    traffic = watch(first=x[:32], second=x[32:])
    shrink(x, a, config=config)
    assert [tile for tile, _ in groupby(traffic.order)] == ["first", "second"]
    assert traffic.loads["first"] == 2 * x[:32].nbytes
    z, h = torch.randn(1, 64), torch.randn(1, 300)
    traffic = watch(first=z[:, :32], second=z[:, 32:])
    reduce(h, z, 2, z.dtype, config=config)
    assert [tile for tile, _ in groupby(traffic.order)] == ["first", "second"]
    assert traffic.loads["first"] == 2 * z[:, :32].nbytes


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_expand_does_not_read_what_it_overwrites(watch, p):
    y, h, a, bias, mask = torch.empty(M, N), torch.randn(M, 96), torch.randn(3, 32, N), torch.randn(N), drop(p, M, N)
    for options in ({}, {"bias": bias}):
        traffic = watch(y=y)
        expand(y, h, a, **mask, accumulate=False, **options)
        assert (traffic.loads["y"], traffic.stores["y"]) == (0, y.nbytes)


@pytest.mark.parametrize(("n", "r"), RANKS)
def test_both_gradients_read_no_more_than_each_alone(watch, n, r):
    """And the gradient of the scale reads nothing large again."""
    h, dy, b, scale = torch.randn(M, n * r), torch.randn(M, N), torch.randn(n, N, r), torch.randn(n, N)
    dh, x, w = torch.randn(M, n * r), torch.randn(M, K), b.transpose(1, 2)
    tensors = {"dy": dy, "x": x, "h": h, "b": b}
    plain = watch(**tensors)
    reduce(h, dy, n, dy.dtype)
    traffic = watch(**tensors)
    reduce_scaled(h, dy, w, scale, 0.5)
    assert traffic.loads["dy"] == plain.loads["dy"] == dy.nbytes
    assert traffic.loads["h"] == plain.loads["h"]
    assert traffic.loads["b"] == b.nbytes
    reduce(dh, x, n, x.dtype)
    alone, traffic = traffic, watch(**tensors)
    reduce_all(h, dy, w, scale, 0.5, dh, x, x.dtype)
    for together, apart in ((traffic.loads, alone.loads), (traffic.stores, alone.stores)):
        assert [together[name] for name in tensors] == [apart[name] for name in tensors]
        assert together["other"] < apart["other"]  # fewer parts


def test_the_mask_is_an_eighth_of_a_byte_an_element(watch):
    traffic = watch()
    draw(torch.tensor([5]), M, 256, 0.1)
    assert traffic.stores["other"] == M * 256 / 8


def test_experts_read_their_rows_once_and_no_weight_but_of_those_that_have_rows(watch):
    """x by row without a sorted copy, nothing of rows of no expert, and no gradient but those that are asked for."""
    counts, E, n, r = [40, 0, 3], 3, 2, 8
    live, S = sum(counts), sum(counts) + 5
    offs, index = torch.tensor(counts).cumsum(0).int(), torch.randperm(S) // 2
    x, dy, h = torch.randn(S // 2 + 1, K), torch.randn(S, N), torch.randn(S, n * r)
    a, b, scale = torch.randn(E, n, r, K), torch.randn(E, n, N, r), torch.randn(E, n, N)
    row, tile, tiles = K * 4, KernelConfig(32, 32, 4, 1), [2, 0, 1]

    traffic = watch(x=x, a=a, empty=a[1])
    out = grouped_shrink(x, a, offs, index=index, config=tile)
    assert traffic.loads["x"] == live * row
    assert traffic.loads["a"] == sum(tiles) * a[0].nbytes
    assert traffic.loads["empty"] == 0
    assert traffic.stores["other"] == out.nbytes
    y = dy.clone()
    traffic = watch(y=y, b=b)
    grouped_expand(y, h, b.transpose(2, 3), offs, scale, 0.5, config=tile)
    assert traffic.loads["y"] == traffic.stores["y"] == live * N * 4
    assert traffic.loads["b"] == sum(tiles) * b[0].nbytes
    assert traffic.stores["other"] == 0
    traffic = watch(x=x)
    da = grouped_reduce(h, x, offs, n, x.dtype, index, config=tile)
    assert traffic.loads["x"] == live * row
    assert traffic.stores["other"] == da.nbytes
    traffic = watch(dy=dy, b=b, scale=scale)
    db, ds = grouped_reduce_scaled(h, dy, b.transpose(2, 3), offs, scale, 0.5, config=tile)
    assert traffic.loads["dy"] == live * N * 4
    assert traffic.loads["b"] == b.nbytes
    assert traffic.stores["other"] == db.nbytes + ds.nbytes
