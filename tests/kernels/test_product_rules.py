"""Where the joint kernel can run, where it is the faster way, and what it says of a caller's mistakes."""

import pytest
import torch
from device import DEVICE
from formulas import P
from product_problem import Problem, needs_copy_engine, packed_bits
from triton import knobs

from multilora_fast.kernels import product as module
from multilora_fast.kernels.configs import PRODUCT_TILES, PRODUCT_WINS, product_config
from multilora_fast.kernels.launch import _compiled_in
from multilora_fast.kernels.product import describe, product, serves

pytestmark = needs_copy_engine


def test_what_is_served(monkeypatch):
    problem = Problem((5, 24, 40, 2, 8), torch.float16)
    x, weight, h, y = problem.x, problem.weight, problem.h, problem.dy
    assert serves(x, weight, h, y)
    assert serves(x, weight, None, y.to("meta"))
    apart = torch.empty(5, 25, dtype=torch.float16, device=DEVICE)
    refused = [
        (x[:, 1:], weight[:, 1:], h, y), (apart[:, :24], weight, h, y), (x.T.contiguous().T, weight, h, y),
        (x[:1].expand(5, 24), weight, h, y), (x, weight[:, :20].contiguous(), h, y), (x, weight, h[:, 1:], y),
        (x, weight, h[:, :12].contiguous(), y), (x, weight, h, y[:, :9].contiguous()), (x[:0], weight, h, y),
    ]  # fmt: skip
    assert [serves(*tensors) for tensors in refused] == [False] * len(refused)
    for arch in ("sm_80", "sm_89", "gfx942"):
        monkeypatch.setattr(module, "device_of", lambda x, arch=arch: (arch, 4))
        assert not serves(x, weight, h, y)
        with pytest.raises(ValueError, match=f"x is on {arch}"):
            product(x, weight, None, h, problem.b, transposed=True)


def test_half_precision_alone_is_served_by_a_gpu(monkeypatch):
    problem = Problem((5, 24, 40, 2, 8), torch.float32)
    half = Problem((5, 24, 40, 2, 8), torch.bfloat16)
    monkeypatch.setattr(module, "device_of", lambda x: ("sm_90", 132))
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        assert serves(half.x, half.weight, half.h, half.dy)
        assert not serves(problem.x, problem.weight, problem.h, problem.dy)


def test_mistakes_are_named():
    problem = Problem((5, 24, 40, 2, 8), torch.float16)
    x, weight, h, b = problem.x, problem.weight, problem.h, problem.b
    bits = packed_bits(torch.ones(5, 40, dtype=torch.bool, device=DEVICE))
    branches = (None, h, b)
    mistakes = {
        "x has shape": (x[0], weight, *branches),
        "x has shape .* wanted rows": (x[:, 1:], weight[:, 1:], *branches),
        "weight has shape": (x, weight.T, *branches),
        "weight has .* torch.float32, wanted": (x, weight.float(), *branches),
        "bias has shape": (x, weight, problem.bias[1:], h, b),
        "w has shape": (x, weight, None, h, b.mT),
        "scale has shape": (x, weight, *branches, problem.scale[:, 1:]),
        "h has shape": (x, weight, None, h[1:], b),
        "bits has shape": (x, weight, *branches, None, 1.0, bits[:, :1], P),
        "bits has .* torch.int64, wanted": (x, weight, *branches, None, 1.0, bits.long(), P),
        "p is 1": (x, weight, *branches, None, 1.0, bits, 1.0),
    }
    for match, arguments in mistakes.items():
        with pytest.raises(ValueError, match=match):
            product(*arguments, transposed=True)
    with pytest.raises(ValueError, match="out has shape"):
        product(x, weight, None, h, b, transposed=True, out=x)


def test_launches_differ_in_the_blocks_and_types_of_their_descriptors():
    x = torch.zeros(64, 64, dtype=torch.float16, device=DEVICE)
    kinds = [describe(x, 32, 64), describe(x, 64, 32), describe(x.bfloat16(), 32, 64)]
    assert len({_compiled_in(kind) for kind in kinds}) == 3
    assert _compiled_in(describe(x[:9], 32, 64)) == _compiled_in(kinds[0])


@pytest.mark.parametrize(
    ("direction", "M", "K", "N", "R", "wins"),
    [
        ("forward", 8192, 4096, 4096, 96, True), ("backward", 8192, 4096, 4096, 96, True),
        ("forward", 8192, 4096, 4096, 160, False), ("backward", 8192, 4096, 4096, 160, True),
        ("forward", 8192, 4096, 11008, 96, True), ("backward", 8192, 4096, 11008, 96, True),
        ("forward", 8192, 11008, 4096, 96, False), ("backward", 8192, 11008, 4096, 96, True),
        ("forward", 2048, 4096, 4096, 96, True), ("backward", 2048, 4096, 4096, 96, True),
        ("forward", 1024, 4096, 4096, 96, True), ("backward", 1024, 4096, 4096, 96, True),
        ("forward", 2048, 4096, 11008, 96, False), ("backward", 2048, 4096, 11008, 96, False),
        ("forward", 512, 4096, 4096, 96, False), ("forward", 8192, 1024, 1024, 96, False),
        ("forward", 8192, 5120, 5120, 96, True), ("forward", 8192, 4096, 4096, 32, True),
    ],
)  # fmt: skip
def test_the_table_takes_the_faster_way(direction, M, K, N, R, wins):
    """The first rows are the H100's measured ones."""
    chosen = product_config(direction, M, K, N, R, torch.bfloat16, "sm_90")
    assert chosen == (PRODUCT_TILES["sm_90"] if wins else None)
    assert product_config(direction, M, K, N, R, torch.float16, "sm_90") == chosen


def test_nothing_unmeasured_takes_the_joint_kernel():
    assert {arch for arch, _ in PRODUCT_WINS} == {"sm_90"}
    for arch in ("sm_80", "sm_100", "sm_120", "gfx942", "interpreter", "cpu"):
        assert product_config("forward", 8192, 4096, 4096, 96, torch.bfloat16, arch) is None
    assert product_config("forward", 8192, 4096, 4096, 96, torch.float32, "sm_90") is None
