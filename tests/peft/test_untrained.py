"""init: the adapter that get_peft_model would make, from the config of a model whose weights are not there."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import ATTENTION, gpt2, llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig, T5Config
from typer.testing import CliRunner

from multilora_fast.cli import app
from multilora_fast.peft import MultiLoraConfig, init_adapter


def saved(folder, model):
    """Its config where ``init`` finds no weights, the whole beside it."""
    model.save_pretrained(folder / "whole")
    model.config.save_pretrained(folder / "config")
    return folder / "config", folder / "whole"


def assert_equal(a, b):
    a, b = (dict(model.named_parameters()) for model in (a, b))
    assert a.keys() == b.keys()
    for name, p in a.items():
        assert (p.dtype, p.requires_grad) == (b[name].dtype, b[name].requires_grad), name
        assert torch.equal(p, b[name]), name
    assert any(p.requires_grad for p in a.values())


def made_both_ways(whole, adapter, seed, auto=AutoModelForCausalLM, base=None, **options):
    loaded = PeftModel.from_pretrained(auto.from_pretrained(whole, **base or {}), adapter, is_trainable=True)
    model = auto.from_pretrained(whole, **base or {})
    torch.manual_seed(seed)
    return loaded, get_peft_model(model, MultiLoraConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ATTENTION, "rank_pattern": {"k_proj": 2}, "lora_num_pattern": {"q_proj": 1}},
        {"target_modules": r".*layers\.1\..*(up|down)_proj", "scaling": "scalar", "lora_alpha": 2.0},
        {"target_modules": ["q_proj", "lm_head"], "init_weights": False, "lora_dropout": 0.1},
        {"layers_to_transform": [1], "r": 2, "lora_num": 1},
    ],
    ids=lambda options: str(options.get("target_modules", "default")),
)
def test_it_is_that_of_get_peft_model_to_the_bit(options, tmp_path):
    options = {"r": 4, "task_type": "CAUSAL_LM", **options}
    config, whole = saved(tmp_path, llama())
    before = torch.get_rng_state()
    found = init_adapter(config, tmp_path / "adapter", MultiLoraConfig(**options), seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    loaded, made = made_both_ways(whole, tmp_path / "adapter", 7, **options)
    assert_equal(loaded, made)
    assert found["parameters"] == made.get_nb_trainable_parameters()[0]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(config)
    other = init_adapter(config, tmp_path / "other", MultiLoraConfig(**options), seed=8)
    assert other == found
    assert (tmp_path / "other/adapter_model.safetensors").read_bytes() != (
        tmp_path / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_on_conv1d(tmp_path):
    config, whole = saved(tmp_path, gpt2())
    init_adapter(config, tmp_path / "adapter", MultiLoraConfig(r=4), seed=1)
    assert_equal(*made_both_ways(whole, tmp_path / "adapter", 1, r=4, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("asked", [None, "bfloat16"])
def test_branches_are_drawn_in_the_dtype_of_the_base(asked, tmp_path):
    config, whole = saved(tmp_path, llama(torch.float32 if asked else torch.bfloat16))
    init_adapter(config, tmp_path / "adapter", MultiLoraConfig(r=4), seed=1, dtype=asked)
    loaded, made = made_both_ways(whole, tmp_path / "adapter", 1, base={"dtype": torch.bfloat16}, r=4)
    assert_equal(loaded.base_model, made.base_model)
    branch = next(p for name, p in loaded.named_parameters() if "lora_A" in name)
    assert branch.dtype == torch.float32
    assert torch.equal(branch, branch.bfloat16().float())


def test_of_a_quantized_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    _, whole = saved(tmp_path, llama(torch.bfloat16, hidden_size=64))
    config = AutoConfig.from_pretrained(whole)
    config.quantization_config = four_bits.to_dict()
    config.save_pretrained(tmp_path / "quantized")
    init_adapter(tmp_path / "quantized", tmp_path / "adapter", MultiLoraConfig(r=4), seed=3)
    base = {"quantization_config": four_bits, "dtype": torch.bfloat16}
    loaded, made = made_both_ways(whole, tmp_path / "adapter", 3, base=base, r=4)
    ours, theirs = ({k: p for k, p in m.named_parameters() if "lora_" in k} for m in (loaded, made.base_model))
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        assert torch.equal(a, b), name


def test_of_an_encoder_and_decoder(tmp_path):
    small = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config, whole = saved(tmp_path, AutoModelForSeq2SeqLM.from_config(small))
    options = {"r": 2, "task_type": "SEQ_2_SEQ_LM"}
    init_adapter(config, tmp_path / "adapter", MultiLoraConfig(**options))
    assert_equal(*made_both_ways(whole, tmp_path / "adapter", 0, AutoModelForSeq2SeqLM, **options))


def test_the_command_takes_the_options_of_the_config(tmp_path):
    config, whole = saved(tmp_path, llama())
    words = [
        "init", config, tmp_path / "adapter", "--r", 4, "--lora-num", 2, "--target-modules", "q_proj, up_proj",
        "--rank-pattern", '{"up_proj": 2}', "--lora-alpha", 3, "--scaling", "scalar", "--no-share-inputs", "--seed", 5,
        "--layers-to-transform", "0,1", "--exclude-modules", ".*0.*up_proj", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    loaded, made = made_both_ways(
        whole, tmp_path / "adapter", 5, r=4, lora_num=2, target_modules=["q_proj", "up_proj"], lora_alpha=3,
        rank_pattern={"up_proj": 2}, scaling="scalar", share_inputs=False, layers_to_transform=[0, 1],
        exclude_modules=".*0.*up_proj", task_type="CAUSAL_LM",
    )  # fmt: skip
    assert_equal(loaded, made)
    fields = {**vars(made.peft_config["default"]), "base_model_name_or_path": str(config)}
    assert vars(loaded.peft_config["default"]) == fields
    assert json.loads(result.stdout) == {
        "output": str(tmp_path / "adapter"), "modules": 3, "parameters": made.get_nb_trainable_parameters()[0],
    }  # fmt: skip
