"""bias="all" and "lora_only", as LoraConfig has them: trained, saved, loaded, by one adapter of a model."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from tiny import ATTENTION, IDS, assert_differ, config, gpt2, logits
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from multilora_fast import MultiLoraConfig, export_lora, from_loras, singular_values
from multilora_fast.adapters import load_adapter
from multilora_fast.adapters.files import WEIGHTS

KINDS = ("all", "lora_only")
SAVES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")  # PEFT saves the biases of methods that are not its own


def biased() -> LlamaForCausalLM:
    """Whose q, k and v have biases, and share their input."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.2, attention_bias=True, mlp_bias=True,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def biases(model, grad=False):
    named = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if name.endswith("bias")}
    return {name: p.grad if grad else p for name, p in named.items() if p.requires_grad}


@pytest.mark.skipif(not SAVES, reason="this PEFT saves no biases of other methods")
@pytest.mark.parametrize("bias", KINDS)
def test_the_biases_that_lora_trains_get_its_gradients(bias):
    """And with scales that are not zero those of the model with the update in its weights."""
    options = {"target_modules": ATTENTION, "bias": bias}
    ours = get_peft_model(biased(), MultiLoraConfig(r=2, lora_num=2, **options)).double()
    lora = get_peft_model(biased(), LoraConfig(r=4, **options)).double()
    assert biases(ours).keys() == biases(lora).keys()
    assert len(biases(ours)) == {"all": 14, "lora_only": 8}[bias]
    for model in (ours, lora):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(biases(ours, grad=True), biases(lora, grad=True), rtol=1e-8, atol=1e-12)
    trained = get_peft_model(biased(), config(bias=bias, share_inputs=True)).double()
    trained.train()(input_ids=IDS, labels=IDS).loss.backward()
    found = biases(trained, grad=True)
    merged = trained.merge_and_unload().train()
    merged.zero_grad()
    merged(input_ids=IDS, labels=IDS).loss.backward()
    expected = biases(merged, grad=True)
    torch.testing.assert_close(
        {name.removeprefix("base_model.model."): g for name, g in found.items()}, expected, rtol=1e-8, atol=1e-12
    )


@pytest.mark.skipif(not SAVES, reason="this PEFT saves no biases of other methods")
@pytest.mark.parametrize("make", [biased, gpt2])
@pytest.mark.parametrize("bias", KINDS)
def test_they_are_saved_and_loaded(bias, make, tmp_path):
    names = ["q_proj", "v_proj"] if make is biased else ["c_attn"]
    model = get_peft_model(make(), config(target_modules=names, bias=bias))
    before = logits(model)
    for parameter in biases(model).values():
        nn.init.normal_(parameter)
    expected = logits(model)
    assert_differ(expected, before)
    model.save_pretrained(tmp_path)
    assert sum(key.endswith(".bias") for key in load_file(tmp_path / WEIGHTS)) == len(biases(model))
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path)), expected)
    again = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert biases(again).keys() == biases(model).keys()
    assert singular_values(tmp_path).keys() == singular_values(model).keys()
    if make is biased:
        plain = make().eval()
        load_adapter(plain, tmp_path)
        assert torch.equal(logits(plain), expected)
    for source in (model, tmp_path):
        with pytest.raises(ValueError, match=f"bias='{bias}', which no LoRA"):
            export_lora(source, tmp_path / "out")


@pytest.mark.skipif(not SAVES, reason="this PEFT saves no biases of other methods")
def test_only_one_adapter_has_biases():
    model = get_peft_model(biased(), config(bias="lora_only"))
    for bias in KINDS:
        with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
            model.add_adapter("second", config(bias=bias))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("plain", config())
    with pytest.raises(ValueError, match="modules_to_save or trained biases cannot be summed"):
        model.base_model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "sum")


def test_what_cannot_hold_them_says_so(tmp_path):
    for bias in KINDS:
        get_peft_model(biased(), LoraConfig(target_modules=["q_proj"], bias=bias)).save_pretrained(tmp_path / bias)
        with pytest.raises(ValueError, match=f"bias='{bias}', which MultiLoRA branches cannot hold"):
            from_loras([tmp_path / bias], tmp_path / "out")


@pytest.mark.parametrize("bias", KINDS)
def test_a_peft_that_would_not_save_them_is_an_error(bias, monkeypatch):
    monkeypatch.delattr(BaseTuner, "_get_learnable_bias_state_dict", raising=False)
    with pytest.raises(ValueError, match=f"bias='{bias}' needs PEFT 0.21, which saves the biases"):
        MultiLoraConfig(bias=bias)
