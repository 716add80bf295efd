"""The documented memory of experts, counted at the documented size."""

import torch

from bench.experts import AUTOGRAD, FROZEN, SIZES, memory
from multilora_fast.memory.methods import LORA, OURS

TOKENS = 4096


def counted(name: str) -> tuple[float, float, float]:
    """KiB saved a token, bytes saved besides, GiB at the peak."""
    size = SIZES["Qwen3-30B-A3B"]
    (half, _), (whole, peak) = (memory(name, size, 3, torch.bfloat16, tokens) for tokens in (TOKENS // 2, TOKENS))
    per_token = (whole - half) / (TOKENS / 2)
    return per_token / 2**10, whole - per_token * TOKENS, peak / 2**30


def test_experts_of_qwen3_30b_a3b():
    saved, constant, peak = counted(OURS)
    assert saved <= 86
    assert constant <= 2**10  # where the rows of each expert end
    assert peak <= 0.75
    assert saved < counted(FROZEN)[0] + 17
    lora = counted(LORA)
    assert (round(lora[0]), round(lora[1] / 2**20)) == (112, 1152)
    assert round(lora[2]) in (2, 3)  # 3 with PEFT 0.19
    assert counted(AUTOGRAD)[0] > 5 * saved
