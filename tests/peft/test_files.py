"""MULTILORA adapters as files, in PEFT and in transformers."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from tiny import assert_differ, branches, config, gpt2, layers, llama, logits
from torch import nn
from transformers import AutoModelForCausalLM

from multilora_fast import FusedMultiLoRALinear
from multilora_fast.adapters import load_adapter, save_adapter
from multilora_fast.adapters.files import CONFIG, WEIGHTS
from multilora_fast.peft import MultiLoraConfig


@pytest.mark.parametrize(("make", "low_cpu_mem_usage"), [(llama, False), (gpt2, True)])
def test_reload_gives_the_same_logits(make, low_cpu_mem_usage, tmp_path):
    options = config(target_modules="all-linear", rank_pattern={"q_proj|c_fc": 6}, lora_num_pattern={"c_fc": 2})
    model = get_peft_model(make(), options)
    expected = logits(model)
    assert_differ(expected, logits(make()))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert {key.rpartition(".")[2] for key in keys} == {"lora_A", "lora_B", "lora_scaling"}
    assert make is gpt2 or Q in keys
    again = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    assert all(p.requires_grad == ("multilora" in name) for name, p in trainable.named_parameters())


def test_transformers_and_auto_classes_load_it(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    plain = llama()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain), expected)


def test_an_inference_load_on_a_bfloat16_base_is_frozen(tmp_path):
    model = get_peft_model(llama(torch.bfloat16), config())
    assert {m.lora_A.dtype for m in branches(model)} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path)
    assert not any(p.requires_grad for p in again.parameters())
    assert {m.lora_A.dtype for m in branches(again)} == {torch.float32}
    assert torch.equal(logits(again), logits(model))


def test_files_of_both_kinds_of_models_load_in_both(tmp_path):
    model = get_peft_model(llama(), config(rank_pattern={"q_proj": 2}, lora_num_pattern={"v_proj": 1}))
    expected = logits(model)
    model.save_pretrained(tmp_path / "peft")
    plain = llama()
    assert len(load_adapter(plain, tmp_path / "peft")) == 8
    assert torch.equal(logits(plain), expected)
    save_adapter(plain, tmp_path / "plain")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "plain")), expected)
    again = llama()
    load_adapter(again, tmp_path / "plain")
    assert torch.equal(logits(again), expected)


def test_a_name_that_ends_anothers_is_not_confused(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"lin": nn.Linear(4, 4), "block": nn.ModuleDict({"lin": nn.Linear(4, 4)})})

    model = make()
    model["lin"] = FusedMultiLoRALinear(model["lin"], r=2, lora_num=2)
    save_adapter(model, tmp_path)
    assert set(layers(PeftModel.from_pretrained(make(), tmp_path))) == {"base_model.model.lin"}


def test_tensors_of_other_adapters_in_the_file_are_passed_over(tmp_path):
    """PEFT before 0.20 puts them there."""
    model = get_peft_model(llama(), config())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    others = {key.replace("branches.", "branches.other."): torch.ones_like(t) for key, t in tensors.items()}
    save_file(tensors | others, tmp_path / WEIGHTS)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    plain = llama()
    load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))


def test_modules_to_save(tmp_path):
    model = get_peft_model(llama(), config(modules_to_save=["lm_head"]))
    nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_without_the_library_imported_peft_says_so(tmp_path, monkeypatch):
    get_peft_model(llama(), config()).save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), MultiLoraConfig)
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.MULTILORA)
    with pytest.raises(KeyError, match="MULTILORA"):
        PeftConfig.from_pretrained(tmp_path)


def edit_tensors(change):
    def edit(path):
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return edit


def edit_config(**new):
    return lambda path: (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | new))


Q = "base_model.model.model.layers.0.self_attn.q_proj.multilora_branches.lora_A"
DAMAGE = {
    "cut short": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-10]), "incomplete metadata"),
    "a tensor is missing": (edit_tensors(lambda t: t.pop(Q)), r"lacks \S*q_proj"),
    "another method's": (
        edit_tensors(lambda t: t.update({k.replace("multilora_branches.", ""): t.pop(k) for k in list(t)})),
        "no tensor of this model's MultiLoRA adapters",
    ),
    "other shapes": (edit_config(r=5), "size mismatch"),
    "other targets": (edit_config(target_modules=["k_proj"]), "no tensor of this model's"),
    "unknown targets": (edit_config(target_modules=["query"]), "not found in the base model"),
    "impossible rank": (edit_config(r=-1), "r must be an integer"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_files_are_errors(case, tmp_path):
    get_peft_model(llama(), config(target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path)
    damage, message = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(Exception, match=message):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_base_checkpoint_can_still_be_loaded_into_an_adapted_model():
    model = get_peft_model(llama(), config())
    result = model.base_model.model.load_state_dict(llama().state_dict(), strict=False)
    assert "model.layers.0.self_attn.q_proj.weight" in result.unexpected_keys
    state = model.state_dict()
    assert not any(model.load_state_dict(state))
