"""The caller's mistakes: one sentence that names the argument, what came and what was wanted."""

import math

import pytest
import torch
from torch import nn

from multilora_fast import FusedMultiLoRALinear, MultiLoRALinear, dropout_mask, fuse, multilora_add, multilora_linear

GOOD = {
    "x": torch.zeros(2, 5, 16),
    "weight": torch.zeros(12, 16),
    "bias": torch.zeros(12),
    "lora_A": torch.zeros(3, 4, 16),
    "lora_B": torch.zeros(3, 12, 4),
    "lora_scaling": torch.zeros(3, 12),
}
WRONG = [
    ({"x": torch.zeros(2, 5, 15)}, "x must have shape (..., 16) to match lora_A's K, not (2, 5, 15)."),
    ({"x": torch.tensor(1.0)}, "x must have shape (..., 16) to match lora_A's K, not ()."),
    ({"x": torch.zeros(2, 16, dtype=torch.int64)}, "x must be floating point, not torch.int64."),
    ({"lora_A": torch.zeros(4, 16)}, "lora_A must have shape (n, r, K) with n, r of at least 1, not (4, 16)."),
    ({"lora_A": torch.zeros(3, 0, 16)}, "lora_A must have shape (n, r, K) with n, r of at least 1, not (3, 0, 16)."),
    ({"lora_A": torch.zeros(3, 4, 16, dtype=torch.int32)}, "lora_A must be floating point, not torch.int32."),
    ({"lora_A": torch.zeros(3, 4, 16, device="meta")}, "lora_A is on meta, but x is on cpu: put both on one device."),
    ({"lora_B": torch.zeros(3, 4, 12)}, "lora_B must have shape (3, N, 4) to match lora_A, not (3, 4, 12)."),
    ({"lora_B": torch.zeros(2, 12, 4)}, "lora_B must have shape (3, N, 4) to match lora_A, not (2, 12, 4)."),
    ({"lora_scaling": torch.zeros(3)}, "lora_scaling must have shape (3, 12) or (3, 1), not (3,)."),
    ({"lora_scaling": torch.zeros(12, 3)}, "lora_scaling must have shape (3, 12) or (3, 1), not (12, 3)."),
    ({"weight": torch.zeros(16, 12)}, "weight must have shape (12, 16) to match lora_B and x, not (16, 12)."),
    ({"weight": torch.zeros(12, 16, device="meta")}, "weight is on meta, but x is on cpu: put both on one device."),
    (
        {"weight": torch.zeros(12, 16, dtype=torch.bfloat16)},
        "weight is torch.bfloat16, but x is torch.float32: cast one of them, or use torch.autocast.",
    ),
    ({"weight": lambda: torch.zeros(16, 12)}, "weight must have shape (12, 16) to match lora_B and x, not (16, 12)."),
    ({"weight": None}, "weight must be a tensor or a function that returns one, not None."),
    ({"bias": torch.zeros(11)}, "bias must have shape (12,) to match lora_B and x, not (11,)."),
    ({"dropout_p": 1.0}, "dropout_p must be a probability in [0, 1), not 1.0."),
    ({"dropout_p": -0.1}, "dropout_p must be a probability in [0, 1), not -0.1."),
    ({"dropout_p": float("nan")}, "dropout_p must be a probability in [0, 1), not nan."),
    ({"backend": "cuda"}, 'backend must be "triton", "torch" or None, not \'cuda\'.'),
    ({"scaling_factor": math.nan}, "scaling_factor must be a finite number, not nan."),
    ({"scaling_factor": "2"}, "scaling_factor must be a finite number, not '2'."),
    (
        {"dropout_p": 0.1, "seed": 1.5},
        "seed must be an int of 64 bits or an int64 tensor of one element, not 1.5.",
    ),
    (
        {"dropout_p": 0.1, "seed": torch.zeros(2)},
        "seed must be an int64 tensor of one element on cpu, not torch.float32 (2,) on cpu.",
    ),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_multilora_linear(wrong, message):
    with pytest.raises(ValueError) as error:
        multilora_linear(**{**GOOD, **wrong})
    assert str(error.value) == message


ADD_WRONG = [
    ({"y": torch.zeros(2, 5, 13)}, "y must have shape (2, 5, 12) to match x and lora_B, not (2, 5, 13)."),
    ({"y": torch.zeros(2, 5, 12, dtype=torch.int8)}, "y must be floating point, not torch.int8."),
    ({"y": torch.zeros(2, 5, 12, device="meta")}, "y is on meta, but x is on cpu: put both on one device."),
    ({"x": torch.zeros(2, 5, 15)}, "x must have shape (..., 16) to match lora_A's K, not (2, 5, 15)."),
]


@pytest.mark.parametrize(("wrong", "message"), ADD_WRONG, ids=[message for _, message in ADD_WRONG])
def test_multilora_add(wrong, message):
    good = {k: v for k, v in GOOD.items() if k not in ("weight", "bias")} | {"y": torch.zeros(2, 5, 12)}
    with pytest.raises(ValueError) as error:
        multilora_add(**{**good, **wrong})
    assert str(error.value) == message


LAYER_WRONG = [
    ({"r": 0}, "r must be an integer of at least 1, not 0."),
    ({"r": 2.0}, "r must be an integer of at least 1, not 2.0."),
    ({"lora_num": -1}, "lora_num must be an integer of at least 1, not -1."),
    ({"lora_dropout": 1.0}, "lora_dropout must be a probability in [0, 1), not 1.0."),
    ({"lora_alpha": math.inf}, "lora_alpha must be a number or None, not inf."),
    ({"scaling": "matrix"}, 'scaling must be "vector" or "scalar", not \'matrix\'.'),
    ({"base": nn.Conv1d(1, 1, 1)}, "base must be an nn.Linear, not Conv1d."),
    (
        {"base": MultiLoRALinear(nn.Linear(4, 4), r=2, lora_num=2)},
        "base must be a plain nn.Linear, not a MultiLoRALinear, which computes more than W x + b.",
    ),
]


@pytest.mark.parametrize("cls", [MultiLoRALinear, FusedMultiLoRALinear])
@pytest.mark.parametrize(("wrong", "message"), LAYER_WRONG, ids=[message for _, message in LAYER_WRONG])
def test_layers(wrong, message, cls):
    arguments = {"base": nn.Linear(4, 4), "r": 2, "lora_num": 2} | wrong
    with pytest.raises(ValueError) as error:
        cls(arguments.pop("base"), **arguments)
    assert str(error.value) == message


def test_dropout_mask_and_fuse():
    with pytest.raises(ValueError, match="p must be a probability"):
        dropout_mask(0, 2, 2, 1.0)
    with pytest.raises(ValueError, match="backend must be"):
        fuse(nn.Sequential(), backend="fast")


def test_triton_asked_for_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match='backend "triton" needs a CUDA device'):
        multilora_linear(**GOOD, backend="triton")


def test_dtensors_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        lora_A = distribute_tensor(GOOD["lora_A"], init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="lora_A is a DTensor"):
            multilora_linear(**{**GOOD, "lora_A": lora_A})
    finally:
        dist.destroy_process_group()
