"""The caller's mistakes are ValueErrors that begin with the argument's name."""

import math

import pytest
import torch
from torch import nn

from multilora_fast import FusedMultiLoRALinear, MultiLoRALinear, dropout_mask, fuse, multilora_add, multilora_linear

zeros = torch.zeros
GOOD = {
    "x": zeros(2, 5, 16), "weight": zeros(12, 16), "bias": zeros(12),
    "lora_A": zeros(3, 4, 16), "lora_B": zeros(3, 12, 4), "lora_scaling": zeros(3, 12),
}  # fmt: skip
WRONG = [
    ("x", zeros(2, 5, 15)),
    ("x", torch.tensor(1.0)),
    ("x", zeros(2, 16, dtype=torch.int64)),
    ("x", [[1.0] * 16]),
    ("x", None),
    ("x", zeros(10, 16).to_sparse()),
    ("lora_A", None),
    ("lora_A", zeros(4, 16)),
    ("lora_A", zeros(3, 0, 16)),
    ("lora_A", zeros(3, 4, 16, dtype=torch.int32)),
    ("lora_A", zeros(3, 4, 16, device="meta")),
    ("lora_B", zeros(3, 4, 12)),
    ("lora_B", zeros(2, 12, 4)),
    ("lora_scaling", zeros(3)),
    ("lora_scaling", zeros(12, 3)),
    ("weight", zeros(16, 12)),
    ("weight", zeros(12, 16, device="meta")),
    ("weight", zeros(12, 16, dtype=torch.bfloat16)),
    ("weight", zeros(12, 16).to_sparse()),
    ("weight", lambda: zeros(16, 12)),
    ("weight", lambda: None),
    ("weight", None),
    ("bias", zeros(11)),
    ("dropout_p", 1.0),
    ("dropout_p", -0.1),
    ("dropout_p", math.nan),
    ("backend", "cuda"),
    ("scaling_factor", math.nan),
    ("scaling_factor", "2"),
    ("save_inputs", "int4"),
    ("exact_base", 1.5),
    ("seed", 1.5),
    ("seed", zeros(2)),
]
ADD_WRONG = [
    ("y", None),
    ("y", [1.0]),
    ("y", zeros(2, 5, 13)),
    ("y", zeros(2, 5, 12, dtype=torch.int8)),
    ("y", zeros(2, 5, 12, device="meta")),
    ("x", zeros(2, 5, 15)),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_multilora_linear(name, value):
    with pytest.raises(ValueError, match=f"^{name} ") as error:
        multilora_linear(**{**GOOD, "dropout_p": 0.1, name: value})
    assert str(error.value).count("\n") == 0
    assert str(error.value).endswith(".")


def test_a_message_says_what_came_and_what_was_wanted():
    with pytest.raises(ValueError, match=r"^lora_B must have shape \(3, N, 4\) to match lora_A, not \(2, 12, 4\)\.$"):
        multilora_linear(**GOOD | {"lora_B": zeros(2, 12, 4)})


@pytest.mark.parametrize(("name", "value"), ADD_WRONG)
def test_multilora_add(name, value):
    good = {k: v for k, v in GOOD.items() if k not in ("weight", "bias")} | {"y": zeros(2, 5, 12)}
    with pytest.raises(ValueError, match=f"^{name} "):
        multilora_add(**{**good, name: value})


LAYER_WRONG = [
    ("r", 0),
    ("r", 2.0),
    ("lora_num", -1),
    ("lora_dropout", 1.0),
    ("lora_alpha", math.inf),
    ("scaling", "matrix"),
    ("base", nn.Conv1d(1, 1, 1)),
    ("base", MultiLoRALinear(nn.Linear(4, 4), r=2, lora_num=2)),
]


@pytest.mark.parametrize("cls", [MultiLoRALinear, FusedMultiLoRALinear])
@pytest.mark.parametrize(("name", "value"), LAYER_WRONG)
def test_layers(name, value, cls):
    arguments = {"base": nn.Linear(4, 4), "r": 2, "lora_num": 2, name: value}
    with pytest.raises(ValueError, match=f"^{name} "):
        cls(arguments.pop("base"), **arguments)


def test_dropout_mask_and_fuse():
    with pytest.raises(ValueError, match="p must be a probability"):
        dropout_mask(0, 2, 2, 1.0)
    for seed in (None, torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="seed must be an int"):
            dropout_mask(seed, 2, 2, 0.5)
    with pytest.raises(ValueError, match="backend must be"):
        fuse(nn.Sequential(), backend="fast")
    with pytest.raises(ValueError, match="share_inputs must be True or False, not 2"):
        fuse(nn.Sequential(), share_inputs=2)


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
