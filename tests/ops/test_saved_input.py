"""x saved in 8 bits: which gradient it changes, by how much, and where x stays exact."""

import pytest
import torch
from peft import get_peft_model
from tiny import IDS, config, llama
from torch.nn import functional as F

from multilora_fast import multilora_linear
from multilora_fast.memory import saved_bytes
from multilora_fast.ops.saved_input import restore, save_input
from multilora_fast.testing import random_case, run


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return (torch.linalg.norm(got - wanted) / torch.linalg.norm(wanted)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_value_is_within_the_rounding_of_e4m3(dtype):
    x = (torch.randn(64, 100) * torch.logspace(-3, 3, 64)[:, None]).to(dtype)
    values, scale = save_input(x, "fp8")
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (64, 1)
    got, smallest = restore(values, scale, dtype).double(), 2.0**-10 * scale.double()
    assert ((got - x.double()).abs() <= (x.double().abs() / 16).maximum(smallest)).all()


def test_zeros_and_non_finite_values():
    x = torch.zeros(4, 8)
    x[1, 3], x[2, 0], x[3] = torch.inf, torch.nan, 1e-30
    got = restore(*save_input(x, "fp8"), torch.float32)
    assert torch.equal(got[0], x[0])
    assert not got[1].isfinite().all()
    assert not got[2].isfinite().all()
    assert error(got[3].double(), x[3].double()) < 0.07


def test_float16_inputs_below_its_normal_numbers_stay_finite():
    x = torch.tensor([[6e-8, 3e-7, 0.0], [1e-6, -2e-6, 5e-7]], dtype=torch.float16)
    values, scale = save_input(x, "fp8")
    assert scale.min() >= torch.finfo(torch.float16).smallest_normal
    again = restore(values, scale, torch.float16)
    assert torch.isfinite(again).all()
    assert (again - x).abs().max() <= 0.07 * x.abs().max()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_the_gradient_of_lora_A_is_rounded(p):
    case = random_case((96, 64), 48, 3, 8, dtype=torch.float32)

    def op(choice):
        return lambda x, **v: multilora_linear(x, **v, dropout_p=p, seed=5, save_inputs=choice)

    weight = case.parameters["weight"]
    wanted = {"x", "bias", "lora_A", "lora_B", "lora_scaling"}
    exact, rounded = (run(op(choice), case, wanted) for choice in ("exact", "fp8"))
    assert weight.grad is None
    for name in exact.keys() - {"lora_A"}:
        assert torch.equal(rounded[name], exact[name]), name
    assert 0.005 < error(rounded["lora_A"], exact["lora_A"]) < 0.04


def test_the_mean_over_many_draws_has_no_bias():
    """Of 200 draws of x the mean error of dÃ shrinks as independent errors do: 14 times."""
    torch.manual_seed(0)
    A, B, s = torch.randn(2, 4, 32), torch.randn(2, 24, 4), torch.randn(2, 24)
    W, dy = torch.randn(24, 32), torch.randn(64, 24)
    errors = []
    for _ in range(200):
        x = torch.randn(64, 32)
        found = []
        for choice in ("exact", "fp8"):
            leaf = A.clone().requires_grad_()
            multilora_linear(x, W, None, leaf, B, s, save_inputs=choice).backward(dy)
            found.append(leaf.grad)
        errors.append(found[1] - found[0])
    errors = torch.stack(errors)
    single = errors.flatten(1).norm(dim=1).mean()
    assert errors.mean(0).norm() < 2 * single / 200**0.5


def test_what_attention_keeps_is_not_kept_again():
    q = torch.randn(1, 6, 2, 16, requires_grad=True).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert save_input(out.transpose(1, 2).reshape(1, 6, 32), "fp8")[1] is None
    assert save_input((out * 2).transpose(1, 2).reshape(1, 6, 32), "fp8")[1] is not None


def test_a_trainable_weight_keeps_x_exact():
    case = random_case((8, 16), 12, 2, 4, dtype=torch.float32)
    exact, rounded = (run(lambda x, c=c, **v: multilora_linear(x, **v, save_inputs=c), case) for c in ("exact", "fp8"))
    assert all(torch.equal(rounded[name], exact[name]) for name in exact)


def test_a_model_saves_less_and_checkpointing_gives_the_same(monkeypatch):
    def model_of(choice):
        model = get_peft_model(llama(torch.bfloat16), config(target_modules="all-linear", save_inputs=choice))
        return model.train()

    totals = {}
    for choice in ("exact", "fp8"):
        model = model_of(choice)
        with saved_bytes(model.parameters()) as saved:
            model(IDS)
        totals[choice] = saved.total
    # Per token and block: the inputs of q/k/v, of gate/up and of down in one byte instead of two, and a float32 each.
    assert totals["exact"] - totals["fp8"] == 2 * IDS.numel() * (32 + 32 + 48 - 3 * 4)
    grads = []
    for checkpointing in (False, True):
        model = model_of("fp8")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_errors():
    case = random_case((8, 16), 12, 2, 4)
    with pytest.raises(ValueError, match="save_inputs must be"):
        config(save_inputs="int4")
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="cannot be compiled"):
        torch.compile(multilora_linear, backend="aot_eager", fullgraph=True)(
            case.x, **case.parameters, save_inputs="fp8"
        )
    torch.compiler.reset()
