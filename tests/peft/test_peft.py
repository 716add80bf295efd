"""MULTILORA as a PEFT method: configuration, creation, and the op inside."""

import copy
import pickle

import pytest
import torch
from peft import PeftType, get_peft_model
from tiny import ATTENTION, IDS, branches, config, layers, llama, logits, two_adapters
from torch import nn

from multilora_fast import FusedMultiLoRALinear
from multilora_fast.memory import saved_bytes
from multilora_fast.peft import MultiLoraConfig, MultiLoraModel
from multilora_fast.peft.register import register
from multilora_fast.testing import assert_two_times_rule, random_case


def test_registration_is_a_true_member_and_can_be_repeated():
    assert PeftType("MULTILORA") is PeftType.MULTILORA
    assert "MULTILORA" in list(PeftType)
    register(MultiLoraConfig, MultiLoraModel)

    class Other(MultiLoraConfig):
        pass

    with pytest.raises(ImportError, match="already has a method"):
        register(Other, MultiLoraModel)


def test_a_fresh_adapter_answers_as_the_base_does_and_learns():
    model = get_peft_model(llama(), MultiLoraConfig(target_modules=ATTENTION))
    assert torch.equal(logits(model), logits(llama()))
    assert all(m.lora_A.shape == (3, 32, 32) and m.scaling_factor == 1.0 for m in branches(model))
    model(IDS, labels=IDS).loss.backward()
    for module in branches(model):
        assert not module.lora_A.grad.any()
        assert not module.lora_B.grad.any()
        assert module.lora_scaling.grad.any()
    assert not any(p.grad is not None for n, p in model.named_parameters() if "multilora" not in n)


def test_trainable_parameters_are_the_branches(capsys):
    model = get_peft_model(llama(), config(target_modules=["q_proj"], scaling="scalar"))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 3
    assert all(".multilora_branches.default.lora_" in name for name in trainable)
    model.print_trainable_parameters()
    assert f"trainable params: {2 * (2 * 3 * 4 * 32 + 3):,}" in capsys.readouterr().out


def test_default_targets_are_those_of_lora():
    model = get_peft_model(llama(), MultiLoraConfig(r=2))
    assert {name.rpartition(".")[2] for name in layers(model)} == {"q_proj", "v_proj"}


def test_all_linear_also_on_an_adapted_model():
    model = get_peft_model(llama(), config(target_modules="all-linear"))
    names = set(layers(model))
    assert len(names) == 14
    assert not any("lm_head" in name for name in names)
    model.add_adapter("second", config(target_modules="all-linear"))
    assert set(layers(model)) == names
    assert all("second" in layer.multilora_branches for layer in layers(model).values())


def test_patterns_layers_and_exclusions():
    options = config(
        target_modules=["q_proj", "v_proj", "up_proj"],
        exclude_modules=["up_proj"],
        layers_to_transform=[1],
        layers_pattern="layers",
        rank_pattern={"v_proj": 2},
        alpha_pattern={"v_proj": 8},
        lora_num_pattern={"layers.1.self_attn.q_proj": 5},
    )
    model = get_peft_model(llama(), options)
    found = {name.rpartition(".")[2]: layer.multilora_branches["default"] for name, layer in layers(model).items()}
    assert set(found) == {"q_proj", "v_proj"}
    assert all(".1." in name for name in layers(model))
    assert found["q_proj"].lora_A.shape[:2] == (5, 4)
    assert found["q_proj"].scaling_factor == 1.5
    assert found["v_proj"].lora_A.shape[:2] == (3, 2)
    assert found["v_proj"].scaling_factor == 4


def test_alpha_none_follows_a_patterned_rank():
    model = get_peft_model(llama(), config(lora_alpha=None, rank_pattern={"q_proj": 2}))
    assert {m.scaling_factor for m in branches(model)} == {1.0}


def test_targets_that_match_nothing():
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(llama(), config(target_modules=["queries"]))
    with pytest.warns(UserWarning, match="target_modules queries match no module"):
        get_peft_model(llama(), config(target_modules=["q_proj", "queries"]))
    with pytest.warns(UserWarning, match="lora_num_pattern keys matches no adapted module"):
        get_peft_model(llama(), config(lora_num_pattern={"keys": 2, "q_proj": 2}))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"lora_num_pattern": {"q": -1}}, "lora_num"),
        ({"lora_dropout": 1}, "lora_dropout"),
        ({"layers_pattern": "h"}, "layers_pattern"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform"),
    ],
)
def test_config_errors(wrong, name):
    with pytest.raises(ValueError, match=name):
        MultiLoraConfig(**wrong)


def test_modules_that_cannot_be_adapted():
    with pytest.raises(ValueError, match="embed_tokens is a Embedding"):
        get_peft_model(llama(), config(target_modules=["embed_tokens"]))
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match=r"mha\.out_proj belongs to an nn\.MultiheadAttention"):
        get_peft_model(attention, config(target_modules=["out_proj"]))
    parallel = llama()
    parallel._tp_size = 2
    with pytest.raises(ValueError, match="tensor parallelism"):
        get_peft_model(parallel, config())


# The op inside


def wrapped(case, dtype=None):
    """A function of x and the case's parameters that runs the PEFT layer on them."""
    n, r, K = case.parameters["lora_A"].shape
    N = case.parameters["lora_B"].shape[1]

    def op(x, weight, lora_A, lora_B, lora_scaling, bias=None):
        base = nn.Linear(K, N, bias=bias is not None)
        model = get_peft_model(
            nn.ModuleDict({"lin": base}),
            MultiLoraConfig(r=r, lora_num=n, lora_alpha=r * case.scaling_factor, target_modules=["lin"]),
        )
        layer = model.base_model.model["lin"]
        layer.base_layer._parameters.update(weight=weight, bias=bias)
        inner = layer.multilora_branches["default"]
        inner._parameters.update(lora_A=lora_A, lora_B=lora_B, lora_scaling=lora_scaling)
        return layer(x)

    return op


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_the_layer_keeps_the_two_times_rule(dtype, adapter_dtype):
    case = random_case((2, 9, 16), 24, 3, 4, dtype=dtype, adapter_dtype=adapter_dtype)
    assert_two_times_rule(wrapped(case), case)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_float32_adapters_on_a_bfloat16_base_save_what_the_fused_layer_saves(dropout):
    torch.manual_seed(0)
    base = nn.Linear(64, 48, dtype=torch.bfloat16)
    base.requires_grad_(False)
    fused = FusedMultiLoRALinear(base, r=4, lora_num=3, lora_dropout=dropout)
    for name in ("lora_A", "lora_B", "lora_scaling"):
        setattr(fused, name, nn.Parameter(getattr(fused, name).float()))
    options = MultiLoraConfig(r=4, lora_num=3, lora_dropout=dropout, target_modules=["lin"])
    model = get_peft_model(nn.ModuleDict({"lin": base}), options)
    peft = model.base_model.model["lin"]
    assert peft.multilora_branches["default"].lora_A.dtype == torch.float32
    totals = []
    for layer in (fused, peft):
        x = torch.randn(2, 50, 64, dtype=torch.bfloat16, requires_grad=True)
        with saved_bytes(layer.parameters()) as saved:
            layer(x).sum().backward()
        totals.append(saved.total)
    assert totals[0] == totals[1] == 100 * (64 + 12) * 2 + (8 if dropout else 0)


def test_base_layers_with_hooks_or_their_own_forward_run_themselves():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for base in (Doubling(8, 8), nn.Linear(8, 8)):
        calls = []
        base.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model = get_peft_model(nn.ModuleDict({"lin": base}), config(target_modules=["lin"]))
        layer = model.base_model.model["lin"]
        x = torch.randn(3, 8)
        torch.testing.assert_close(layer(x), base(x) + x @ layer.get_delta_weight("default").t())
        assert len(calls) == 2


def test_autocast_and_two_adapters_have_gradients():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for use_reentrant in (None, False, True):
        model = get_peft_model(llama(), config(lora_dropout=0.1)).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b, c in zip(*gradients, strict=True):
        torch.testing.assert_close([b, c], [a, a])


def test_deepcopy_and_pickle_of_the_config():
    model = get_peft_model(llama(), config())
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert pickle.loads(pickle.dumps(config())) == config()
