"""The table of configurations, and how a rank and a sum are cut: data, which no kernel runs for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multilora_fast.kernels import configs
from multilora_fast.kernels.configs import KernelConfig


def test_every_lookup_finds_a_row():
    for kernel in ("shrink", "expand", "reduce", "grouped_shrink", "grouped_expand", "grouped_reduce"):
        for M in (1, 64, 65, 1024, 1025, 4096, 10**6):
            for R in (1, 64, 65, 128, 129, 256, 257, 1000):
                for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
                    for arch in ("sm_90", "sm_75", "gfx1100", "interpreter"):
                        for add, dropout in ((False, False), (True, False), (False, True), (True, True)):
                            config = configs.pick(kernel, M, R, dtype, arch, add, dropout)
                            assert isinstance(config, KernelConfig)


def test_a_row_is_of_the_use_or_of_none_and_measured_or_the_default():
    find = lambda *args, **use: configs.find_row("expand", *args, **use)[0::3]  # noqa: E731
    assert find(8192, 96, torch.bfloat16, "sm_90", add=True) == ("expand", "sm_90")
    assert find(8192, 96, torch.bfloat16, "sm_90", dropout=True) == ("expand dropout", "sm_90")
    assert find(8192, 96, torch.bfloat16, "sm_90", add=True, dropout=True) == ("expand", "sm_90")
    assert find(8192, 160, torch.bfloat16, "sm_90", add=True) == ("expand", "sm_90")
    assert find(8192, 96, torch.bfloat16, "sm_75", add=True) == ("expand", "default")
    assert all(row.min_steps is None for key, row in configs.TUNED_CONFIGS.items() if key[:2] == ("shrink", "2048"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("M", [2048, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shrink_does_not_split_many_tokens(M, dtype, arch):
    for dropout in (False, True):
        config = configs.pick("shrink", M, 96, dtype, arch, dropout=dropout)
        assert configs.split_k(-(-M // config.BLOCK_M), 64, 132, config.min_steps) == (1, 64)


@given(R=st.integers(1, 1200), columns=st.sampled_from([256, 512]), two_tiles=st.booleans())
def test_rank_tiles_cover_the_rank(R, columns, two_tiles):
    first, second = configs.rank_tiles(R, KernelConfig(64, 32, 8, 2, two_tiles=two_tiles, columns=columns))
    assert first & (first - 1) == 0
    assert second & (second - 1) == 0
    assert first + second <= columns
    chunks = -(-R // (first + second))
    assert chunks == -(-R // columns)


@pytest.mark.parametrize(
    ("R", "wide", "narrow"),
    [
        (96, (64, 32), (64, 32)), (160, (128, 32), (128, 32)), (288, (256, 32), (128, 16)), (320, (256, 64), (128, 32)),
        (384, (256, 128), (128, 64)), (480, (512, 0), (256, 0)), (512, (512, 0), (256, 0)), (520, (256, 16), (128, 64)),
    ],
)  # fmt: skip
def test_two_tiles_where_that_pads_less(R, wide, narrow):
    assert configs.rank_tiles(R, KernelConfig(64, 32, 8, 2, columns=512)) == wide
    assert configs.rank_tiles(R, KernelConfig(64, 32, 8, 2, columns=256)) == narrow


@given(tiles=st.integers(1, 5000), steps=st.integers(0, 5000), processors=st.integers(1, 200), least=st.integers(1, 8))
def test_splits_cover_every_step(tiles, steps, processors, least):
    parts, per_part = configs.split_k(tiles, steps, processors, least)
    assert parts >= 1
    assert parts * per_part >= steps
    assert (parts - 1) * per_part < max(steps, 1)
