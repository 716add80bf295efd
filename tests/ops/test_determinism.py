"""The same seed gives the same bits, with and without torch.use_deterministic_algorithms."""

from functools import partial

import pytest
import torch
from peft import get_peft_model
from tiny import IDS, llama
from tiny_training import PROMPTS, config, make_tokenizer, write

from multilora_fast import FusedMultiLoRALinear, multilora_linear
from multilora_fast.adapters.files import WEIGHTS
from multilora_fast.testing import random_case, run
from multilora_fast.training.config import TrainSettings
from multilora_fast.training.run import run as train


@pytest.fixture
def _algorithms(request):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(before)


def trained(seed: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The branches of a new adapter after four steps with dropout."""
    base = llama(dtype).to(device)
    torch.manual_seed(seed)
    model = get_peft_model(base, config(lora_dropout=0.2, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ids = IDS.to(device)
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("dtype", "_algorithms"), [(torch.float32, False), (torch.bfloat16, True)], ids=str, indirect=["_algorithms"]
)
def test_two_runs_end_with_the_same_weights(dtype, _algorithms, device):
    first, second, other = (trained(seed, device, dtype) for seed in (1, 1, 2))
    assert all(torch.equal(second[name], p) for name, p in first.items())
    assert not any(torch.equal(other[name], p) for name, p in first.items())


@pytest.mark.parametrize("_algorithms", [False, True], indirect=True)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_output_and_gradients_have_the_same_bits_twice(backend, _algorithms, device):
    case = random_case((3, 30, 72), 48, 3, 12, device=device)
    op = partial(multilora_linear, scaling_factor=2.0, dropout_p=0.3, seed=5, backend=backend)
    first, second = run(op, case), run(op, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("_algorithms", [True], indirect=True)
def test_the_train_command_writes_the_same_file_twice(tmp_path, _algorithms):
    llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = write(tmp_path / "sky.jsonl", PROMPTS)
    options = {"r": 4, "dtype": "float32", "max_steps": 2, "lora_dropout": 0.1, "eval_fraction": 0.0}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        train(TrainSettings(str(tmp_path / "model"), tmp_path / name, (data,), seed=seed, **options))
    one, two, other = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


def test_a_layer_forgets_what_it_ran_before(device):
    """The bits of a step do not depend on the steps before it."""
    torch.manual_seed(0)
    layer = FusedMultiLoRALinear(torch.nn.Linear(24, 16), r=4, lora_num=3, lora_dropout=0.3).to(device)
    torch.nn.init.normal_(layer.lora_scaling)
    x = torch.randn(5, 24, device=device)

    def step():
        torch.manual_seed(7)
        layer.zero_grad()
        layer(x).sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    first = step()
    layer(torch.randn(9, 24, device=device)).sum().backward()
    assert all(map(torch.equal, first, step()))
