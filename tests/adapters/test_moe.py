"""Exports of MoE models, whose dense layers and shared experts PEFT takes for experts by their names."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import assert_differ, assert_same_logits, config, llama, logits
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from multilora_fast import export_lora, from_loras, singular_values
from multilora_fast.adapters.files import CONFIG, WEIGHTS
from multilora_fast.adapters.naming import lora_targets

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.2, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHARED = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS = {  # the first layer is dense, the second has experts
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 8},
    "qwen3_next": {
        "num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16, "head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek_v2": {**SHARED, **LATENT, "head_dim": 8, "topk_method": "greedy"},
    "deepseek_v3": {**SHARED, **LATENT},
    "glm4_moe": {**SHARED, "head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        "moe_layer_end_index": 1, "moe_layer_interval": 1,
    },
    "afmoe": {"num_experts": 4, "num_dense_layers": 1, "num_shared_experts": 1, "head_dim": 8},  # and attention's gate
}  # fmt: skip
MLP = ("gate_proj", "up_proj", "down_proj")
KINDS = {
    "attention": lambda name: "attn" in name and not name.endswith(MLP),
    "shared expert": lambda name: "shared" in name,
    "dense": lambda name: "attn" not in name and "shared" not in name and name.endswith(MLP),
    "down alone": lambda name: name.endswith("down_proj"),
    "all": lambda name: name != "lm_head",
}


def moe(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **MODELS[kind])).float().eval()


def chosen(model, kind):
    return [n for n, module in model.named_modules() if type(module) is nn.Linear and KINDS[kind](n)]


@pytest.fixture(scope="module", autouse=True)
def loads(tmp_path_factory):
    """Skips where PEFT cannot load a LoRA of its own, because its version and transformers' do not fit together."""
    folder = tmp_path_factory.mktemp("probe")
    get_peft_model(moe("qwen3_moe"), LoraConfig(target_modules=["o_proj"])).save_pretrained(folder)
    try:
        PeftModel.from_pretrained(moe("qwen3_moe"), folder)
    except TypeError as error:
        pytest.skip(f"PEFT cannot load its own LoRA on a MoE model: {error}")


@pytest.mark.parametrize(
    ("kind", "what"), [*((kind, "all") for kind in MODELS), *(("deepseek_v3", what) for what in KINDS if what != "all")]
)
def test_plain_peft_loads_the_same_model(kind, what, tmp_path):
    base = moe(kind)
    names = chosen(base, what)
    plain = logits(base)
    model = get_peft_model(base, config(r=2, lora_num=2, target_modules=names))
    expected = logits(model)
    assert_differ(expected, plain)
    export_lora(model, tmp_path / "out")
    exported = PeftModel.from_pretrained(moe(kind), tmp_path / "out")
    assert_same_logits(logits(exported), expected, 3e-6)
    if what == "all":
        model.save_pretrained(tmp_path / "source")
        export_lora(tmp_path / "source", tmp_path / "again")
        assert all(
            (tmp_path / "out" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in (CONFIG, WEIGHTS)
        )
        assert_same_logits(logits(exported.merge_and_unload()), expected, 3e-6)


def test_attention_is_named_as_ever_and_a_dense_model_too(tmp_path):
    """Servers read target_modules; target_parameters are for what PEFT would take for something else."""
    for model, names in ((moe("qwen3_moe"), ["q_proj", "o_proj"]), (llama(), ["q_proj", *MLP])):
        export_lora(get_peft_model(model, config(target_modules=names)), tmp_path, overwrite=True)
        written = json.loads((tmp_path / CONFIG).read_text())
        assert {name.rpartition(".")[2] for name in written["target_modules"]} == set(names)
        assert written["target_parameters"] is None


@pytest.mark.parametrize("known", ["type", "directory", None])
def test_the_type_of_the_base_comes_from_the_adapter_or_from_the_base(known, tmp_path):
    base = moe("glm4_moe")
    base.save_pretrained(tmp_path / "base")
    names = chosen(base, "shared expert")
    get_peft_model(base, config(target_modules=names)).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / CONFIG
    saved = json.loads(path.read_text())
    assert saved["base_model_type"] == "glm4_moe"
    changes = {
        "type": {},
        "directory": {"base_model_type": None, "base_model_name_or_path": str(tmp_path / "base")},
        None: {"base_model_type": None, "base_model_name_or_path": "not/there"},
    }
    path.write_text(json.dumps(saved | changes[known]))
    if known is None:
        with pytest.raises(ValueError, match="base_model_type"):
            export_lora(tmp_path / "source", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    export_lora(tmp_path / "source", tmp_path / "out")
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert written["target_modules"] == []
    assert written["target_parameters"] == sorted(f"{name}.weight" for name in names)


def test_an_export_can_be_merged_and_measured(tmp_path):
    base = moe("ernie4_5_moe")
    model = get_peft_model(base, config(target_modules=chosen(base, "all")))
    expected = logits(model)
    export_lora(model, tmp_path / "lora")
    merged = PeftModel.from_pretrained(moe("ernie4_5_moe"), from_loras([tmp_path / "lora"], tmp_path / "merged"))
    assert_same_logits(logits(merged), expected, 3e-6)
    assert singular_values(tmp_path / "lora").keys() == singular_values(model).keys()
    export_lora(merged, tmp_path / "again")
    again = PeftModel.from_pretrained(moe("ernie4_5_moe"), tmp_path / "again")
    assert_same_logits(logits(again), expected, 3e-6)


def test_names_of_mixtral_and_of_unknown_models():
    names = ["layers.0.w1", "layers.0.q_proj", "layers.1.down_proj"]
    assert lora_targets(names, None) == {"target_modules": sorted(names), "target_parameters": None}
    assert lora_targets(names, "minimax")["target_parameters"] == ["layers.0.w1.weight"]
    assert lora_targets(names, "glm4_moe")["target_parameters"] == ["layers.1.down_proj.weight"]
    assert lora_targets(names, "llama")["target_parameters"] is None
