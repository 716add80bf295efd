"""What all-linear leaves out, and what is refused: with a word, and as LoRA does or says."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import config, llama
from tiny_moe import moe
from torch import nn
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def siglip() -> SiglipVisionModel:
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=16, patch_size=8))


def expert_parameters(model, *names: str) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(names))


def warned(make, text: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(w.message) for w in caught if text in str(w.message)]


def test_all_linear_leaves_out_what_multihead_attention_never_calls(tmp_path):
    with pytest.warns(UserWarning, match=r"all-linear leaves out head\.attention\.out_proj: an nn\.MultiheadAttention"):
        model = get_peft_model(siglip(), config(target_modules="all-linear"))
    lora = get_peft_model(siglip(), LoraConfig(target_modules="all-linear"))
    left = {"head.attention.out_proj"}
    assert set(model.base_model.targeted_module_names) == set(lora.base_model.targeted_module_names) - left
    pixels = torch.randn(2, 3, 16, 16)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = PeftModel.from_pretrained(siglip(), tmp_path)
        assert torch.equal(again(pixels).pooler_output, model.eval()(pixels).pooler_output)
        assert not torch.equal(again(pixels).pooler_output, siglip()(pixels).pooler_output)
    model.add_adapter("second", config(target_modules="all-linear"))
    assert not left & set(model.base_model.targeted_module_names)


def test_what_is_excluded_is_not_warned_of():
    def excluded():
        options = config(target_modules="all-linear", exclude_modules=["head.attention.out_proj"])
        assert "head.attention.out_proj" not in get_peft_model(siglip(), options).base_model.targeted_module_names

    assert not warned(excluded, "leaves out")


def test_named_attention_is_an_error():
    with pytest.raises(ValueError, match=r"head\.attention\.out_proj belongs to an nn\.MultiheadAttention"):
        get_peft_model(siglip(), config(target_modules=["q_proj", "attention.out_proj"]))


STATE_SPACES = [
    lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)),
    lambda: FalconMambaForCausalLM(FalconMambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1)),
    lambda: Mamba2ForCausalLM(
        Mamba2Config(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1)
    ),
    lambda: FalconH1ForCausalLM(
        FalconH1Config(vocab_size=64, **SMALL, num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4,
                       mamba_d_head=8, mamba_n_groups=1)
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "targets"),
    zip(STATE_SPACES, (["in_proj", "out_proj"], ["in_proj", "conv1d"], "all-linear", "all-linear"), strict=True),
)
def test_what_mamba_kernels_pass_by_is_refused_as_for_lora(make, targets):
    for options in (LoraConfig(target_modules=targets), config(target_modules=targets)):
        with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
            get_peft_model(make(), options)
    model = get_peft_model(make(), config(target_modules=targets, exclude_modules=["out_proj", "conv1d"]))
    names = model.base_model.targeted_module_names
    assert any(name.endswith("in_proj") for name in names)
    assert not any(name.endswith(("out_proj", "conv1d")) for name in names)


def test_out_proj_elsewhere_is_adapted():
    model = nn.ModuleDict({"out_proj": nn.Linear(8, 8)})
    assert get_peft_model(model, config(target_modules=["out_proj"])).base_model.targeted_module_names == ["out_proj"]


@pytest.mark.parametrize(
    ("targets", "parameters", "dense"),
    [
        ("all-linear", ("experts.gate_up_proj", "experts.down_proj", "gate.weight"), [0]),
        (["q_proj", "gate_proj", "up_proj", "down_proj"], ("experts.gate_up_proj", "experts.down_proj"), []),
        (r".*\.(q_proj|down_proj)", ("experts.gate_up_proj", "experts.down_proj"), [0]),
    ],
)
def test_experts_that_are_left_out_are_counted(targets, parameters, dense):
    count = expert_parameters(moe(mlp_only_layers=dense), *parameters)
    found = warned(
        lambda: get_peft_model(moe(mlp_only_layers=dense), config(target_modules=targets)), "experts and routers"
    )
    assert len(found) == 1
    assert found[0].startswith(f"{count:,} parameters of experts and routers are not adapted")


def test_experts_nobody_asked_for_are_not_mentioned():
    def quiet():
        get_peft_model(moe(), config(target_modules=["q_proj"]))
        get_peft_model(moe(), config(target_modules="all-linear", exclude_modules=["experts", "gate"]))
        get_peft_model(moe(), config(target_modules=["q_proj", "down_proj"], exclude_modules=r".*\.experts"))
        get_peft_model(llama(), config(target_modules="all-linear"))
        get_peft_model(moe(), config(target_modules="all-linear", inference_mode=True))

    assert not warned(quiet, "not adapted")
    some = config(target_modules="all-linear", layers_to_transform=[0])
    assert warned(lambda: get_peft_model(moe(), some), "not adapted")
